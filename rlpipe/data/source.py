"""Where prompts come from, and how far a run has got."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from rlpipe.errors import CheckpointError, DataError
from rlpipe.trajectory import Prompt


class PromptSource(ABC):
    """Prompts by index: a pure function of (seed, index), so that a cursor is a number.

    task: name · verifier: default verifier · alphabet: every character that prompts and responses can contain (for character
    tokenizers), empty if unknown · size: prompts of a pass, None if endless.
    """

    task: str
    verifier: str
    alphabet: str = ""
    size: int | None = None

    @abstractmethod
    def prompt(self, index: int) -> Prompt:
        """The index-th training prompt."""

    @abstractmethod
    def test_prompts(self, count: int) -> list[Prompt]:
        """Up to `count` held-out prompts: never among the training prompts, the same for every seed."""

    def demonstration(self, index: int) -> Prompt:
        """A training prompt with a reference response. Raises DataError if the task has none."""
        raise DataError(f"task {self.task} has no demonstrations; set warm_start.steps=0")


class Cursor:
    """Hands out prompts in order and remembers the place."""

    def __init__(self, source: PromptSource):
        self.source, self.index = source, 0

    def take(self, count: int) -> list[Prompt]:
        prompts = [self.source.prompt(self.index + i) for i in range(count)]
        self.index += count
        return prompts

    def state(self) -> dict[str, Any]:
        return {"task": self.source.task, "index": self.index}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for the state of another task."""
        if state.get("task") != self.source.task:
            raise CheckpointError(f"the checkpoint's prompts are of task {state.get('task')}, this run's of {self.source.task}")
        self.index = state["index"]


def stable_generator(*parts: object):
    """A `random.Random` that depends on the parts alone, not on the process."""
    import random

    return random.Random("\x00".join(map(str, parts)))


def held_out(text: str) -> bool:
    """True for the eighth of all prompts that is kept for testing; by content, so no seed can leak one into training."""
    import zlib

    return zlib.crc32(text.encode()) % 8 == 0
