"""Any procedural task of the reasoning-gym library, by name."""

from __future__ import annotations

import difflib
import logging
import math
import os
import string
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import fields
from itertools import count as integers
from typing import Any

from rlpipe.data.source import PromptSource, distinct, held_out, stable_generator
from rlpipe.errors import ConfigError, DataError
from rlpipe.trajectory import Prompt

log = logging.getLogger("rlpipe")

CHUNK = 500  # entries of one data set of the library; some tasks prepare all of them at once, or refuse large sizes
OPEN_CHUNKS = 8
SPLIT_ATTEMPTS = 200  # draws before a task is declared to have too few questions
HASH_DEPENDENT = {  # library 0.1.25: entries follow the iteration order of sets, so they differ between processes
    "codeio", "intermediate_integration", "isomorphic_strings", "knight_swap", "list_functions",
    "polynomial_multiplication", "ransom_note", "word_ladder",
}  # fmt: skip


class ReasoningGym(PromptSource):
    """Entries are a function of (seed, index). options go to the library's own configuration of the task.

    The answer carries what the library's scorer needs: {"dataset": name, "options": …, "entry": the library's entry as
    the text of a Python literal}; JSON alone would turn its tuples into lists, which some scorers then refuse. Raises
    ConfigError for an unknown task or option, DataError if too few different questions exist.
    """

    verifier, alphabet = "reasoning_gym", "".join(sorted("\n" + string.printable[:95]))

    def __init__(self, name: str, seed: int, /, **options: Any):
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"data.task=reasoning_gym:{name}: the library has no such task; did you mean {near}?")
        known = [field.name for field in fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
        for option in options:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
                hint = f"did you mean {near[0]}? ({', '.join(known)})" if near else "it has none"
                raise ConfigError(f"data.options do not fit {name}: the task has no option {option}; {hint}")
        self.name, self.seed, self.options = name, seed, options
        self.task = f"reasoning_gym:{name}"
        self.identity = f"{self.task}(seed={seed}, options={sorted(options.items())})"
        self._open: OrderedDict[tuple, Any] = OrderedDict()
        self._test: tuple[int, list[Prompt]] = (0, [])
        self._dataset("train 0", seed, 0)
        if name in HASH_DEPENDENT and os.environ.get("PYTHONHASHSEED", "random") == "random":
            log.warning("%s gives other prompts in every process; set PYTHONHASHSEED=0 to repeat or resume a run", self.task)

    def _dataset(self, stream: str, seed: int | str, chunk: int) -> Any:
        """The library's data set of one chunk. Its seed is hashed: the library adds the index to it, so neighbouring
        seeds would share nearly all their entries."""
        key = (stream, seed, chunk)
        if key not in self._open:
            import reasoning_gym

            chunk_seed = stable_generator(self.task, *key).getrandbits(31)
            try:
                self._open[key] = reasoning_gym.create_dataset(self.name, seed=chunk_seed, size=CHUNK, **self.options)
            except (TypeError, AssertionError, ValueError) as error:
                raise ConfigError(f"data.options={self.options} do not fit {self.task}: {error}") from error
            if len(self._open) > OPEN_CHUNKS:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def _entry(self, stream: str, seed: int | str, index: int) -> dict[str, Any]:
        return self._dataset(stream, seed, index // CHUNK)[index % CHUNK]

    def _train_entry(self, stream: str, index: int) -> dict[str, Any]:
        """The index-th entry; one whose question is held out is replaced by that of the next parallel stream."""
        for attempt in range(SPLIT_ATTEMPTS):
            entry = self._entry(f"{stream} {attempt}", self.seed, index)
            if not held_out(entry["question"]):
                return entry
        raise DataError(f"{self.task} has too few different questions to hold some out; widen data.options")

    def _make(self, kind: str, index: int, entry: dict[str, Any], demonstration: str | None = None) -> Prompt:
        parts = {key: _literal(entry[key], self.task) for key in ("question", "answer", "metadata")}
        return Prompt(
            uid=f"{self.task}/{kind}/{index}",
            task=self.task,
            text=entry["question"],
            answer={"dataset": self.name, "options": self.options, "entry": repr(parts)},
            demonstration=demonstration,
        )

    def prompt(self, index: int) -> Prompt:
        return self._make("train", index, self._train_entry("train", index))

    def test_prompts(self, count: int) -> list[Prompt]:
        """As of every source; kept, because the library takes seconds for an entry of its slowest tasks."""
        if self._test[0] < count:
            entries = ((i, self._entry("test", "all seeds", i)) for i in integers())
            candidates = (self._make("test", i, entry) for i, entry in _held_out_only(entries, self.task))
            self._test = (count, distinct(candidates, count, patience=100))
        return self._test[1][:count]

    def demonstration(self, index: int) -> Prompt:
        """The library's own answer. Raises DataError for the tasks that only judge answers and know none."""
        entry = self._train_entry("demonstration", index)
        if not isinstance(entry["answer"], str):
            raise DataError(f"{self.task} has no reference answers to demonstrate; set warm_start.steps=0")
        return self._make("demonstration", index, entry, entry["answer"])


def _held_out_only(entries: Iterator[tuple[int, dict]], task: str) -> Iterator[tuple[int, dict]]:
    """Those whose question is held out; DataError if SPLIT_ATTEMPTS in a row are not."""
    missed = 0
    for index, entry in entries:
        if held_out(entry["question"]):
            missed = 0
            yield index, entry
        elif (missed := missed + 1) >= SPLIT_ATTEMPTS:
            raise DataError(f"{task} has too few different questions to hold some out; widen data.options")


def _literal(value: Any, task: str) -> Any:
    """The same value in plain Python types, so that its `repr` can be read back. numpy scalars become Python's own."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            plain = kind(value)
            if kind is float and not math.isfinite(plain):
                break
            return plain
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = set if isinstance(value, (set, frozenset)) else tuple if isinstance(value, tuple) else list
        return kind(_literal(item, task) for item in value)
    if isinstance(value, dict):
        return {_literal(key, task): _literal(item, task) for key, item in value.items()}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _literal(value.item(), task)
    raise DataError(f"{task}: an entry holds {value!r} ({type(value).__name__}), which cannot be handed to a verifier")
