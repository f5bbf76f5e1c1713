"""Prompts from a JSONL file: one object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlpipe.data.source import PromptSource, stable_generator
from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt

PROMPT_FIELDS = ("prompt", "question")
ANSWER_FIELDS = ("answer", "ground_truth_answer")


class JsonlSource(PromptSource):
    """`{"prompt" or "question": text, "answer" or "ground_truth_answer": text or object, "demonstration": text (optional)}`.

    Every pass over the file has a fresh order, a function of seed and pass. Raises DataError, naming file, line and field,
    when the source is built and not in mid-run.
    """

    task, verifier = "jsonl", "exact"

    def __init__(self, train: str, test: str, seed: int):
        self.seed = seed
        self.records, self.test_records = read(Path(train)), read(Path(test))
        self.size = len(self.records)
        self._orders: dict[int, list[int]] = {}

    def _order(self, turn: int) -> list[int]:
        if turn not in self._orders:
            order = list(range(self.size))
            stable_generator("jsonl", self.seed, turn).shuffle(order)
            self._orders = {turn: order}  # one pass at a time is enough
        return self._orders[turn]

    def prompt(self, index: int) -> Prompt:
        turn, place = divmod(index, self.size)
        line = self._order(turn)[place]
        return _prompt(f"jsonl/{turn}/{line}", self.records[line])

    def test_prompts(self, count: int) -> list[Prompt]:
        return [_prompt(f"jsonl/test/{i}", record) for i, record in enumerate(self.test_records[:count])]

    def demonstration(self, index: int) -> Prompt:
        prompt = self.prompt(index)
        if prompt.demonstration is None:
            raise DataError(f"{prompt.uid} has no field 'demonstration', which a warm start needs; or set warm_start.steps=0")
        return prompt


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file; DataError for the first line that is not usable."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; set data.train and data.test to JSONL files")
    records = []
    with path.open(encoding="utf8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
            _check(record, path, number)
            records.append(record)
    if not records:
        raise DataError(f"{path} holds no records")
    return records


def _check(record: Any, path: Path, number: int) -> None:
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: a {type(record).__name__} where an object with fields was expected")
    for names in (PROMPT_FIELDS, ANSWER_FIELDS):
        if not any(name in record for name in names):
            raise DataError(f"{path}:{number}: no field '{names[0]}' (or '{names[1]}'); it has {', '.join(record) or 'none'}")
    text = next(record[name] for name in PROMPT_FIELDS if name in record)
    if not isinstance(text, str) or not text:
        raise DataError(f"{path}:{number}: field '{PROMPT_FIELDS[0]}' must be a text that is not empty")


def _prompt(uid: str, record: dict[str, Any]) -> Prompt:
    text = next(record[name] for name in PROMPT_FIELDS if name in record)
    answer = next(record[name] for name in ANSWER_FIELDS if name in record)
    return Prompt(
        uid=uid,
        task=record.get("task", "jsonl"),
        text=text,
        answer=answer if isinstance(answer, dict) else {"answer": answer},
        demonstration=record.get("demonstration"),
    )
