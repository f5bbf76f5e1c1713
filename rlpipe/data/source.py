"""Where prompts come from, and how far a run has got."""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rlpipe.data.report import Report
from rlpipe.errors import CheckpointError, ConfigError, DataError
from rlpipe.trajectory import Prompt

if TYPE_CHECKING:
    from rlpipe.data.pass_rates import PassRateLog

ATTEMPTS = 10_000  # draws before a procedural task is declared to have no puzzle of the wanted kind


class PromptSource(ABC):
    """Prompts by index: a pure function of (seed, index), so that a cursor is a number.

    task: name · verifier: default verifier · alphabet: every character that prompts and responses can contain, sorted
    (for character tokenizers), empty if unknown · size: prompts of a pass, None if endless · max_response_chars: enough
    for a right response to every prompt, None if unknown · identity: what the prompts depend on; a cursor of another
    one is refused · reports: what became of the records that were read, training ones first · block_sizes: those that prompts
    ask for · verifiers: all that they need, `verifier` first.
    """

    task: str
    verifier: str
    identity: str
    alphabet: str = ""
    size: int | None = None
    max_response_chars: int | None = None
    reports: tuple[Report, ...] = ()
    block_sizes: tuple[int, ...] = ()

    @property
    def verifiers(self) -> tuple[str, ...]:
        return (self.verifier,)

    @abstractmethod
    def prompt(self, index: int) -> Prompt:
        """The index-th training prompt."""

    @abstractmethod
    def test_prompts(self, count: int) -> list[Prompt]:
        """Up to `count` different held-out prompts: never among the training prompts, the same for every seed."""

    def demonstration(self, index: int) -> Prompt:
        """A training prompt with a reference response. Raises DataError if the task has none."""
        raise DataError(f"task {self.task} has no demonstrations; set warm_start.steps=0")


class Cursor:
    """Hands out prompts in order and remembers the place. `dropped` counts those that were given up afterwards. log: where to
    write how often each was solved, None for nowhere."""

    def __init__(self, source: PromptSource, log: PassRateLog | None = None):
        self.source, self.index, self.dropped, self.log = source, 0, 0, log

    def take(self, count: int) -> list[Prompt]:
        prompts = [self.source.prompt(self.index + i) for i in range(count)]
        self.index += count
        return prompts

    def drop(self, count: int = 1) -> None:
        self.dropped += count

    def solved(self, groups: Iterable[tuple[Prompt, Sequence[float]]]) -> None:
        """Each prompt with the rewards of its responses."""
        if self.log is not None:
            self.log.add(groups)

    def state(self) -> dict[str, Any]:
        """JSON-able; `restore` continues from it."""
        return {"source": self.source.identity, "index": self.index, "dropped": self.dropped}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for the state of another source, or one that is no state."""
        if state.get("source") != self.source.identity:
            raise CheckpointError(
                f"the checkpoint's prompts come from {state.get('source')}, this run's from {self.source.identity}; "
                "resume with the same data, or start anew with resume=never"
            )
        index, dropped = state.get("index"), state.get("dropped")
        if not all(type(number) is int and number >= 0 for number in (index, dropped)):
            raise CheckpointError(f"the checkpoint's cursor is damaged: {state}; resume from an earlier checkpoint")
        self.index, self.dropped = index, dropped


def stable_generator(*parts: object) -> random.Random:
    """A generator that depends on the parts alone, not on the process."""
    return random.Random("\x00".join(map(str, parts)))


def held_out(text: str) -> bool:
    """True for the eighth of all prompts that is kept for testing; by content, so no seed leaks one into training."""
    return zlib.crc32(text.encode()) % 8 == 0


def distinct(candidates: Iterable[Prompt], count: int, patience: int = 1000) -> list[Prompt]:
    """The first `count` prompts with different texts; fewer once `patience` candidates in a row bring nothing new."""
    found: dict[str, Prompt] = {}
    repeats = 0
    for prompt in candidates if count > 0 else ():
        repeats = repeats + 1 if prompt.text in found else 0
        found.setdefault(prompt.text, prompt)
        if len(found) == count or repeats == patience:
            break
    return list(found.values())


def whole_number(task: str, name: str, value: object, low: int, high: int) -> int:
    """The option's value. Raises ConfigError unless it is an int in [low, high]."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"data.options.{name}={value!r}: task {task} needs a whole number from {low} to {high}")
    return value


def share(task: str, name: str, value: object) -> float:
    """The option's value. Raises ConfigError unless it is a number in [0, 1]."""
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ConfigError(f"data.options.{name}={value!r}: task {task} needs a number from 0 to 1")
    return float(value)
