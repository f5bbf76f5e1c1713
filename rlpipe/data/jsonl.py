"""Prompts from a JSONL file: one object a line."""

from __future__ import annotations

import json
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.data.source import PromptSource, stable_generator
from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt

log = logging.getLogger("rlpipe")

PROMPT_FIELDS = ("prompt", "question")
ANSWER_FIELDS = ("answer", "ground_truth_answer")
TEXT_FIELDS = ("uid", "task", "demonstration")  # optional


@dataclass(frozen=True, slots=True)
class Record:
    """One usable line. place: `file:line` · name: its uid, or its line number."""

    place: str
    name: str
    task: str
    text: str
    answer: dict[str, Any]
    demonstration: str | None

    def prompt(self, uid: str) -> Prompt:
        return Prompt(uid=uid, task=self.task, text=self.text, answer=self.answer, demonstration=self.demonstration)


class JsonlSource(PromptSource):
    """`{"prompt" or "question": text, "answer" or "ground_truth_answer": text, number or object}` a line.

    Optional: `uid`, `task` and `demonstration` (texts). An answer that is no object becomes {"answer": …}. Every pass
    over the file has a fresh order, a function of seed and pass. Training lines whose prompt is also in the test file
    are left out, with a line in the log. Raises DataError, naming file, line and field, when the source is built and
    not in mid-run.
    """

    task, verifier = "jsonl", "exact"

    def __init__(self, train: str, test: str, seed: int):
        self.seed = seed
        records, self.test_records = read(train, "data.train"), read(test, "data.test")
        held = {record.text for record in self.test_records}
        self.records = [record for record in records if record.text not in held]
        if not self.records:
            raise DataError(f"every prompt of {train} is also in {test}, so none is left to train on; give other files")
        if len(self.records) < len(records):
            left_out = len(records) - len(self.records)
            log.warning("%s: %d of %d lines left out, their prompts are in %s", train, left_out, len(records), test)
        self.size = len(self.records)
        self.alphabet = _alphabet([*self.records, *self.test_records])
        checksum = zlib.crc32("\x00".join(record.text for record in self.records).encode("utf8", "surrogatepass"))
        self.identity = f"jsonl(seed={seed}, lines={self.size}, checksum={checksum:08x})"
        self._order: tuple[int, list[int]] = (-1, [])

    def _record(self, index: int) -> tuple[int, Record]:
        """(pass, record) of the index-th prompt."""
        turn, place = divmod(index, self.size)
        if self._order[0] != turn:
            order = list(range(self.size))
            stable_generator("jsonl", self.seed, turn).shuffle(order)
            self._order = (turn, order)
        return turn, self.records[self._order[1][place]]

    def prompt(self, index: int) -> Prompt:
        turn, record = self._record(index)
        return record.prompt(f"jsonl/{turn}/{record.name}")

    def test_prompts(self, count: int) -> list[Prompt]:
        first_of = {record.text: record for record in reversed(self.test_records)}
        kept = [record for record in self.test_records if first_of[record.text] is record]
        return [record.prompt(f"jsonl/test/{record.name}") for record in kept[:count]]

    def demonstration(self, index: int) -> Prompt:
        record = self._record(index)[1]
        if record.demonstration is None:
            raise DataError(
                f"{record.place}: no field 'demonstration', which a warm start needs; add it or set warm_start.steps=0"
            )
        return self.prompt(index)


def read(file: str, key: str) -> list[Record]:
    """All records of a file; DataError for the first line that is not usable. key: the recipe's key for the file."""
    path = Path(file)
    if not file or not path.is_file():
        raise DataError(f"{key}={file}: no such file; set {key} to a JSONL file")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{key}={file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    records = [_record(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise DataError(f"{path} holds no records; {key} needs one JSON object a line")
    seen: dict[str, str] = {}
    for record in records:
        if record.name in seen:
            raise DataError(f"{record.place}: uid {record.name!r} is already that of {seen[record.name]}; make it unique")
        seen[record.name] = record.place
    return records


def _record(line: str, path: Path, number: int) -> Record:
    place = f"{path}:{number}"
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{place}: not usable JSON: nested too deeply") from error
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a {type(fields).__name__} where an object with fields was expected")
    name, text = _field(fields, PROMPT_FIELDS, place)
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: field '{name}' must be a text that is not empty, not {text!r}")
    name, answer = _field(fields, ANSWER_FIELDS, place)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float, dict)):
        raise DataError(f"{place}: field '{name}' must be a text, a number or an object, not {answer!r}")
    for name in TEXT_FIELDS:
        if not isinstance(fields.get(name), (str, type(None))) or fields.get(name) == "":
            raise DataError(f"{place}: field '{name}' must be a text that is not empty, not {fields[name]!r}")
    return Record(
        place=place,
        name=fields.get("uid") or str(number),
        task=fields.get("task") or "jsonl",
        text=text,
        answer=answer if isinstance(answer, dict) else {"answer": answer},
        demonstration=fields.get("demonstration"),
    )


def _field(fields: dict[str, Any], names: tuple[str, str], place: str) -> tuple[str, Any]:
    """(name, value) of the first of the names that is there."""
    for name in names:
        if name in fields:
            return name, fields[name]
    raise DataError(f"{place}: no field '{names[0]}' (or '{names[1]}'); it has {', '.join(fields) or 'none'}")


def _alphabet(records: list[Record]) -> str:
    """Every character of prompts, demonstrations and answers, sorted."""
    used: set[str] = set()
    for record in records:
        used.update(record.text, record.demonstration or "")
        for value in record.answer.values():
            used.update(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(sorted(used))
