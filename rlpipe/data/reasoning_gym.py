"""Any procedural task of the reasoning-gym library, by name."""

from __future__ import annotations

import difflib
import string
from typing import Any

from rlpipe.data.source import PromptSource, held_out
from rlpipe.errors import ConfigError, DataError
from rlpipe.trajectory import Prompt

TEST_SEED = 20_250_901
BIG = 2**31 - 1  # entries are made one by one, so the declared size costs nothing


class ReasoningGym(PromptSource):
    """Entries are a function of (seed, index). options go to the library's own configuration of the task."""

    verifier, alphabet = "reasoning_gym", "".join(sorted(set(string.printable) - set("\r\x0b\x0c")))

    def __init__(self, name: str, seed: int, **options: Any):
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"data.task=reasoning_gym:{name}: the library has no such task; did you mean {near}?")
        self.name, self.task = name, f"reasoning_gym:{name}"
        try:
            self.train = reasoning_gym.create_dataset(name, seed=seed, size=BIG, **options)
            self.test = reasoning_gym.create_dataset(name, seed=TEST_SEED, size=BIG, **options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"data.options={options} do not fit reasoning_gym:{name}: {error}") from error

    def _split(self, dataset: Any, index: int, test: bool) -> dict:
        """The index-th entry on the wanted side of the split; entries on the other side are stepped over by a stride."""
        for attempt in range(200):
            entry = dataset[(index + attempt * 1_000_003) % BIG]
            if held_out(entry["question"]) == test:
                return entry
        raise DataError(f"reasoning_gym:{self.name} has too few different questions to hold some out; widen data.options")

    def _make(self, kind: str, index: int, entry: dict, demonstration: str | None = None) -> Prompt:
        answer = {"dataset": self.name, "entry": {k: entry[k] for k in ("question", "answer", "metadata")}}
        return Prompt(
            uid=f"{self.task}/{kind}/{index}",
            task=self.task,
            text=entry["question"],
            answer=answer,
            demonstration=demonstration,
        )

    def prompt(self, index: int) -> Prompt:
        return self._make("train", index, self._split(self.train, index, False))

    def test_prompts(self, count: int) -> list[Prompt]:
        return [self._make("test", i, self._split(self.test, i, True)) for i in range(count)]

    def demonstration(self, index: int) -> Prompt:
        entry = self._split(self.train, BIG // 2 + index, False)
        return self._make("demonstration", index, entry, str(entry["answer"]))
