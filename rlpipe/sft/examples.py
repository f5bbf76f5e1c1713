"""What supervised training is fed: trajectories, made of a source's demonstrations or recorded by a sampler."""

from __future__ import annotations

import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpipe.data.report import DEMONSTRATION, Report
from rlpipe.data.source import PromptSource, distinct, held_out, stable_generator
from rlpipe.errors import CheckpointError, DataError
from rlpipe.sft.recordings import check_grid, committed
from rlpipe.trajectory import Prompt, Trajectory, replace
from rlpipe.warm_start import response_ids

log = logging.getLogger("rlpipe")

PATIENCE = 10_000  # demonstrations in a row that are held out or left out before the source is said to have nothing else


class Examples(ABC):
    """Trajectories by index, a pure function of (seed, index), so that the place in them is a number.

    held_out: never among those that `take` gives · size: of a pass, None if endless · identity: what they depend on · reports:
    what was left out.
    """

    held_out: list[Trajectory]
    size: int | None
    identity: str
    reports: tuple[Report, ...] = ()

    def __init__(self) -> None:
        self.index = 0
        self.left_out = 0  # since the last `take`

    def take(self, count: int) -> list[Trajectory]:
        """The next `count`."""
        found: list[Trajectory] = []
        passed = self.left_out = 0
        while len(found) < count:
            example = self._example(self.index)
            self.index += 1
            passed = 0 if example else passed + 1
            if example is not None:
                found.append(example)
            elif passed >= PATIENCE:
                raise DataError(f"{self.identity}: there are none but those; lower sft.held_out, or give more that fit")
        return found

    @abstractmethod
    def _example(self, index: int) -> Trajectory | None:
        """None if it is held out or left out."""

    def state(self) -> dict[str, Any]:
        return {"source": self.identity, "index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for the state of other examples."""
        if state.get("source") != self.identity:
            raise CheckpointError(
                f"the checkpoint's examples come from {state.get('source')}, this run's from {self.identity}; resume with the "
                "same data, or start anew with resume=never"
            )
        self.index = int(state["index"])


class Demonstrations(Examples):
    """A prompt source's demonstrations, tokenised.

    Held out are up to `hold_out` of the source's test prompts if those come with demonstrations; if not, its first different
    demonstrations, whose prompts are then left out wherever they come again. block_size: of the model, 0 for full attention.

    All demonstrations of a source with an end are looked at before anything starts. One that is missing, longer than max_tokens
    or on another grid raises DataError, or with skip_bad is left out, counted and listed.
    """

    def __init__(
        self, source: PromptSource, tokenizer, *, max_tokens: int, block_size: int, hold_out: int, skip_bad: bool = False
    ):
        super().__init__()
        self.source, self.tokenizer, self.max_tokens, self.block_size = source, tokenizer, max_tokens, block_size
        self.skip_bad, self.texts = skip_bad, set()
        report = Report(f"demonstrations of {source.task}", "demonstration")  # held-out ones apart
        tests = [prompt for prompt in source.test_prompts(hold_out) if prompt.demonstration is not None] if hold_out else []
        if hold_out and not tests:
            limit = source.size or PATIENCE
            tests = distinct((p for i in range(limit) if (p := self._demonstration(i)) and self._trajectory(p)), hold_out)
        pairs = [(prompt, self._trajectory(prompt)) for prompt in tests]
        self.held_out = [trajectory for _, trajectory in pairs if trajectory]
        self.texts = {prompt.text for prompt, _ in pairs}
        self.size = None if source.size is None else self._look_at(source.size, report)
        self.identity = f"demonstrations of {source.identity}, {len(self.held_out)} held out"

    def _look_at(self, count: int, report: Report) -> int:
        """How many of the first `count` are to be trained on."""
        usable = 0
        for index in range(count):
            report.read += 1
            prompt = self._demonstration(index, report)
            usable += bool(prompt and prompt.text not in self.texts and self._fits(prompt, report))
        if report.dropped:
            self.reports = (report,)
            for line in report.lines():
                log.warning("%s", line)
        if not usable:
            raise DataError(
                f"{report.origin}: of {count}, {report.dropped.total()} cannot be used and {len(self.texts)} are held out, so "
                "none is left to train on; lower sft.held_out, or give more that fit"
            )
        return usable

    def _example(self, index: int) -> Trajectory | None:
        prompt = self._demonstration(index)
        return None if prompt is None or prompt.text in self.texts else self._trajectory(prompt)

    def _demonstration(self, index: int, report: Report | None = None) -> Prompt | None:
        try:
            return self.source.demonstration(index)
        except DataError as error:
            self._leave_out(error, f"{self.source.task}/{index}", report)
            return None

    def _fits(self, prompt: Prompt, report: Report) -> bool:
        """As `_trajectory`, without the prompt's tokens."""
        try:
            check_block_size(prompt, self.block_size)
            response_ids(self.tokenizer, prompt, 0, self.max_tokens, self.block_size)
        except DataError as error:
            self._leave_out(error, prompt.uid, report)
            return False
        return True

    def _trajectory(self, prompt: Prompt) -> Trajectory | None:
        try:
            return as_trajectory(self.tokenizer, prompt, max_tokens=self.max_tokens, block_size=self.block_size)
        except DataError as error:
            self._leave_out(error, prompt.uid, None)
            return None

    def _leave_out(self, error: DataError, place: str, report: Report | None) -> None:
        if not self.skip_bad:
            raise DataError(f"{error}; data.bad_records=skip leaves such ones out and counts them") from error
        self.left_out += 1
        if report is not None:
            report.drop(DEMONSTRATION, place, str(error))


class Recordings(Examples):
    """Recorded trajectories, in a fresh order every pass. Held out are those of an eighth of the prompts, by content: up to
    `hold_out` of them, whose prompts are not trained on. Raises DataError if they were recorded on another grid than the
    model's, or none is left to train on."""

    def __init__(self, trajectories: Sequence[Trajectory], name: str, seed: int, *, block_size: int, hold_out: int):
        super().__init__()
        for trajectory in trajectories:
            check_grid(trajectory, block_size, name)
        self.held_out = [t for t in trajectories if held_out(str(t.prompt_ids.tolist()))][:hold_out]
        out = {t.prompt_ids.tobytes() for t in self.held_out}
        self.rows = [t for t in trajectories if t.prompt_ids.tobytes() not in out]
        if not self.rows:
            raise DataError(
                f"sft.trajectories={name}: all of its {len(trajectories)} trajectories are held out; lower sft.held_out"
            )
        self.name, self.seed, self.size = name, seed, len(self.rows)
        checksum = 0
        for t in self.rows:
            checksum = zlib.crc32(t.prompt_ids.tobytes() + t.response_ids.tobytes(), checksum)
        self.identity = (
            f"recordings(seed={seed}, trajectories={self.size}, checksum={checksum:08x}), {len(self.held_out)} held out"
        )
        self._order: tuple[int, list[int]] = (-1, [])

    def _example(self, index: int) -> Trajectory:
        turn, place = divmod(index, self.size)
        if self._order[0] != turn:
            order = list(range(self.size))
            stable_generator("recordings", self.seed, turn).shuffle(order)
            self._order = (turn, order)
        return self.rows[self._order[1][place]]


def as_trajectory(tokenizer, prompt: Prompt, *, max_tokens: int, block_size: int) -> Trajectory:
    """The demonstration as if it had been committed from left to right, one token a step.

    EOS fills the terminal block (block models) or the canvas of max_tokens (full attention), and all of it counts: a sampler
    fills these places too. The prompt's own block size, under full attention, is that of the decoder it stands for. Raises
    DataError if there is no demonstration, it is longer than max_tokens, or the prompt asks for another grid than the model's.
    """
    check_block_size(prompt, block_size)
    ids = np.array(tokenizer(prompt.text)["input_ids"], np.int32)
    response = response_ids(tokenizer, prompt, len(ids), max_tokens, block_size)
    found = committed(prompt.uid, ids, response, np.arange(len(response), dtype=np.int32), block_size=block_size)
    return replace(found, decoder={"block_size": prompt.block_size}) if prompt.block_size else found


def check_block_size(prompt: Prompt, block_size: int) -> None:
    """DataError if the prompt asks for another grid than the model's. block_size: of the model, 0 for full attention."""
    if block_size and prompt.block_size not in (0, block_size):
        raise DataError(
            f"{prompt.uid} asks for blocks of {prompt.block_size}, but the model attends in blocks of {block_size}; remove its "
            "block_size, or set model.block_size for all"
        )
