"""What supervised training is fed: trajectories, made of a source's demonstrations or recorded by a sampler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpipe.data.source import PromptSource, distinct, held_out, stable_generator
from rlpipe.errors import CheckpointError, DataError
from rlpipe.sft.recordings import check_grid, committed
from rlpipe.trajectory import Prompt, Trajectory, replace
from rlpipe.warm_start import response_ids

PATIENCE = 10_000  # held-out demonstrations in a row before the source is said to have nothing else


class Examples(ABC):
    """Trajectories by index, a pure function of (seed, index), so that the place in them is a number.

    held_out: never among those that `take` gives · size: of a pass, None if endless · identity: what they depend on.
    """

    held_out: list[Trajectory]
    size: int | None
    identity: str

    def __init__(self) -> None:
        self.index = 0

    def take(self, count: int) -> list[Trajectory]:
        """The next `count`."""
        found: list[Trajectory] = []
        passed = 0
        while len(found) < count:
            example = self._example(self.index)
            self.index += 1
            passed = 0 if example else passed + 1
            if example is not None:
                found.append(example)
            elif passed >= PATIENCE:
                raise DataError(f"{self.identity} repeats the {len(self.held_out)} held-out examples only; lower sft.held_out")
        return found

    @abstractmethod
    def _example(self, index: int) -> Trajectory | None:
        """None if it is held out."""

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
    """

    def __init__(self, source: PromptSource, tokenizer, *, max_tokens: int, block_size: int, hold_out: int):
        super().__init__()
        self.source, self.tokenizer, self.max_tokens, self.block_size = source, tokenizer, max_tokens, block_size
        tests = [prompt for prompt in source.test_prompts(hold_out) if prompt.demonstration is not None] if hold_out else []
        if hold_out and not tests:
            limit = source.size or PATIENCE
            tests = distinct((source.demonstration(i) for i in range(limit)), hold_out)
        self.texts = {prompt.text for prompt in tests}
        self.held_out = [self._trajectory(prompt) for prompt in tests]
        self.size = source.size
        self.identity = f"demonstrations of {source.identity}, {len(tests)} held out"

    def _example(self, index: int) -> Trajectory | None:
        prompt = self.source.demonstration(index)
        return None if prompt.text in self.texts else self._trajectory(prompt)

    def _trajectory(self, prompt: Prompt) -> Trajectory:
        return as_trajectory(self.tokenizer, prompt, max_tokens=self.max_tokens, block_size=self.block_size)


class Recordings(Examples):
    """Recorded trajectories, in a fresh order every pass. Those of about an eighth of the prompts, at most `hold_out` of them,
    are held out. Raises DataError if they were recorded on another grid than the model's, or none is left to train on."""

    def __init__(self, trajectories: Sequence[Trajectory], name: str, seed: int, *, block_size: int, hold_out: int):
        super().__init__()
        for trajectory in trajectories:
            check_grid(trajectory, block_size, name)
        self.held_out = [t for t in trajectories if held_out(t.uid)][:hold_out] if hold_out else []
        out = {t.uid for t in self.held_out}
        self.held_out = [t for t in trajectories if t.uid in out]
        self.rows = [t for t in trajectories if t.uid not in out]
        if not self.rows:
            raise DataError(
                f"sft.trajectories={name}: all of its {len(trajectories)} trajectories are held out; lower sft.held_out"
            )
        self.name, self.seed, self.size = name, seed, len(self.rows)
        tokens = sum(t.valid_len for t in self.rows)
        self.identity = f"recordings(seed={seed}, trajectories={self.size}, tokens={tokens}), {len(self.held_out)} held out"
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
    if block_size and prompt.block_size not in (0, block_size):
        raise DataError(
            f"{prompt.uid} asks for blocks of {prompt.block_size}, but the model attends in blocks of {block_size}; remove its "
            "block_size, or set model.block_size for all"
        )
    ids = np.array(tokenizer(prompt.text)["input_ids"], np.int32)
    response = response_ids(tokenizer, prompt, len(ids), max_tokens, block_size)
    found = committed(prompt.uid, ids, response, np.arange(len(response), dtype=np.int32), block_size=block_size)
    return replace(found, decoder={"block_size": prompt.block_size}) if prompt.block_size else found
