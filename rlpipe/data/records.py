"""Prompts from records: whatever file, folder or data set they stand in, and whatever their fields are called."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlpipe.data import report as reasons
from rlpipe.data.files import Where, rows
from rlpipe.data.report import Report
from rlpipe.data.shapes import Shape, lookup, recognise, shape_of
from rlpipe.data.source import PromptSource, stable_generator
from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt


@dataclass(frozen=True, slots=True)
class Record:
    """One usable record. place: `file:line` or `file:row n` · name: its uid, or its line or row number · context: the turns of
    the conversation before its text, (role, content) each · key: of its content, the same in whatever file it stands."""

    place: str
    name: str
    task: str
    text: str
    answer: dict[str, Any]
    verifier: str
    demonstration: str | None = None
    block_size: int = 0
    context: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> str:
        """What tells it from other prompts: its text, with the turns before it."""
        return self.text if not self.context else json.dumps([self.context, self.text])

    @property
    def key(self) -> str:
        return hashlib.blake2b(self.content.encode(), digest_size=8).hexdigest()

    def prompt(self, uid: str, verifier: str) -> Prompt:
        """verifier: the source's own; a record says its verifier only if it is another one."""
        return Prompt(
            uid=uid,
            task=self.task,
            text=self.text,
            answer=self.answer,
            demonstration=self.demonstration,
            verifier="" if self.verifier == verifier else self.verifier,
            block_size=self.block_size,
            context=self.context,
            record=self.key,
        )


class RecordSource(PromptSource):
    """Training records in passes, each pass in a fresh order that is a function of seed and pass, and held-out ones.

    kind: the name of the task · order(records, generator): the records of a pass in the order they are shown in; a shuffle if
    None. Training records whose content is also held out are left out and counted. Raises DataError if none is left; a source
    without any (`train` empty) is for evaluation, and asking it for a training prompt raises DataError.
    """

    def __init__(
        self,
        kind: str,
        seed: int,
        train: Sequence[Record],
        test: Sequence[Record],
        *,
        reports: Sequence[Report] = (),
        order: Callable[[Sequence[Record], Any], list[Record]] | None = None,
        ordered_by: str = "",
    ):
        self.task, self.seed, self.order, self.reports = kind, seed, order, tuple(reports)
        self.test_records = list(test)
        self.records = list(train)
        first = next(iter([*self.records, *self.test_records]))
        self.verifier = first.verifier
        self.ordered_by = ordered_by
        self._pass: tuple[int, list[Record]] = (-1, [])
        self._checksum: int | None = None
        self.leave_out(self.held_texts)

    @property
    def held_texts(self) -> set[str]:
        return {record.content for record in self.test_records}

    def leave_out(self, held: set[str]) -> None:
        """Drop the training records with one of these contents, which some test set has."""
        kept = []
        for record in self.records:
            if record.content in held:
                self._report().drop(reasons.TESTED, record.place, f"{record.place}: its prompt is held out")
            else:
                kept.append(record)
        if self.records and not kept:
            origin = self._report().origin
            raise DataError(f"every prompt of {origin} is also held out, so none is left to train on; give other records")
        self.records = kept
        self.size = len(kept)
        self._pass = (-1, [])
        self._checksum = None

    def _report(self) -> Report:
        return self.reports[0] if self.reports else Report(self.task)

    @property
    def identity(self) -> str:
        if self._checksum is None:  # a checkpoint asks each time
            self._checksum = 0
            for record in self.records:
                facts = [record.content, record.answer, record.verifier, record.demonstration, record.block_size]
                self._checksum = zlib.crc32(json.dumps(facts, sort_keys=True, default=str).encode(), self._checksum)
        order = f", order={self.ordered_by}" if self.ordered_by else ""
        return f"{self.task}(seed={self.seed}, records={self.size}, checksum={self._checksum:08x}{order})"

    @cached_property
    def alphabet(self) -> str:
        """Every character of prompts, demonstrations and answers, sorted."""
        used: set[str] = set()
        for record in (*self.records, *self.test_records):
            used.update(record.text, record.demonstration or "", *(content for _, content in record.context))
            for value in record.answer.values():
                used.update(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        return "".join(sorted(used))

    @property
    def verifiers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record.verifier for record in (*self.records, *self.test_records)))

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({record.block_size for record in (*self.records, *self.test_records) if record.block_size}))

    def _record(self, index: int) -> tuple[int, Record]:
        """(pass, record) of the index-th prompt."""
        if not self.records:
            raise DataError(f"data.task={self.task} is for evaluation: it has no training records; give some with data.train")
        turn, place = divmod(index, self.size)
        if self._pass[0] != turn:
            generator = stable_generator(self.task, self.seed, turn)
            shown = list(self.records)
            if self.order is None:
                generator.shuffle(shown)
            else:
                shown = self.order(shown, generator)
            self._pass = (turn, shown)
        return turn, self._pass[1][place]

    def prompt(self, index: int) -> Prompt:
        turn, record = self._record(index)
        return record.prompt(f"{self.task}/{turn}/{record.name}", self.verifier)

    def test_prompts(self, count: int) -> list[Prompt]:
        first: dict[str, Record] = {}
        for record in self.test_records:
            first.setdefault(record.content, record)
        return [record.prompt(f"{self.task}/test/{record.name}", self.verifier) for record in list(first.values())[:count]]

    def demonstration(self, index: int) -> Prompt:
        record = self._record(index)[1]
        if record.demonstration is None:
            raise DataError(
                f"{record.place}: no field 'demonstration', which supervised training needs; add it, or set warm_start.steps=0"
            )
        return self.prompt(index)


def read(
    where: Where, kind: str, shape: str, columns: Mapping[str, Any], *, skip_bad: bool = False, prefer: str = ""
) -> tuple[list[Record], Report]:
    """All usable records, and what became of the others.

    shape: its name, or auto: what the first readable record looks like, `prefer` (a name) first · columns: fields with names
    of their own (`data.options`). Raises DataError for the first record that is not usable, unless skip_bad; and if there is
    no usable one.
    """
    shape_of("rlpipe").renamed(columns)  # refuses unknown columns before anything is opened
    report, found, known = Report(where.name, shape), [], None if shape == "auto" else shape_of(shape).renamed(columns)
    seen: dict[str, str] = {}
    for place, fields in rows(where):
        report.read += 1
        try:
            if isinstance(fields, DataError):
                raise fields
            if known is None:
                report.shape = prefer if prefer and shape_of(prefer).fits(fields) else recognise(fields)
                known = shape_of(report.shape).renamed(columns)
            record = _record(fields, known, place, kind)
            if record.name in seen:
                raise DataError(f"{place}: uid {record.name!r} is already that of {seen[record.name]}; make it unique")
        except DataError as error:
            if not skip_bad:
                raise
            report.drop(reasons.BAD, place, str(error))
            continue
        seen[record.name] = place
        found.append(record)
    if not found:
        bad = f", {report.read} bad ones apart, the first of them {report.listed[0][2]}" if report.read else ""
        raise DataError(f"{where.name} holds no records{bad}; {where.key} needs some")
    return found, report


def _record(fields: Mapping[str, Any], shape: Shape, place: str, kind: str) -> Record:
    name, value = _field(fields, shape.text, place)
    text, context = _conversation(_converted(shape.read_text, value, fields, name, place), name, place)
    name, value = _field(fields, shape.answer, place)
    answer = _converted(shape.read_answer, value, fields, name, place)
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float, dict)) or answer in ("", {}):
        raise DataError(f"{place}: field '{name}' must be a text, a number or an object that is not empty, not {answer!r:.200}")
    answer = answer if isinstance(answer, dict) else {"answer": answer}
    uid = _optional(fields, shape.uid, place, (str, int))
    block_size = _optional(fields, shape.block_size, place, (int,)) or 0
    if block_size < 0:
        raise DataError(f"{place}: field '{shape.block_size[0]}' must be a number of at least 1, not {block_size}")
    return Record(
        place=place,
        name=str(uid) if uid is not None else place.rpartition(":")[2].removeprefix("row "),
        task=_optional(fields, ("task",), place) or kind,
        text=text,
        answer=answer,
        verifier=_optional(fields, shape.verifier_field, place) or ("code" if "tests" in answer else shape.verifier),
        demonstration=_readable(_optional(fields, shape.demonstration, place), shape.demonstration[0], place),
        block_size=block_size,
        context=context,
    )


def _converted(read: Callable, value: Any, fields: Mapping[str, Any], name: str, place: str) -> Any:
    try:
        return read(value, fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        cause = f"{error}" if isinstance(error, ValueError) else f"cannot be read: {type(error).__name__}: {error}"
        raise DataError(f"{place}: field '{name}' {cause}") from error


def _conversation(value: Any, name: str, place: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(the user's last turn, the turns before it) of a text or of chat messages."""
    context: tuple[tuple[str, str], ...] = ()
    turns = value if isinstance(value, list) else []
    if turns and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        if value[-1]["role"] != "user":
            raise DataError(f"{place}: field '{name}': the last message is the {value[-1]['role']}'s, and must be the user's")
        if not all(isinstance(turn[part], str) for turn in value for part in ("role", "content")):
            raise DataError(f"{place}: field '{name}': role and content of every message must be texts")
        context = tuple((turn["role"], turn["content"]) for turn in value[:-1])
        value = value[-1]["content"]
    if not isinstance(value, str) or not value:
        raise DataError(f"{place}: field '{name}' must be a text that is not empty, not {value!r:.200}")
    for text in (value, *(content for _, content in context)):
        _readable(text, name, place)
    return value, context


def _readable(text: str | None, name: str, place: str) -> str | None:
    """The same. Raises DataError for half of a surrogate pair, which JSON can hold and no tokenizer reads."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field '{name}' holds half a character (\\u{ord(error.object[error.start]):04x}) at place "
            f"{error.start}, which no tokenizer reads; remove it"
        ) from error
    return text


def _field(fields: Mapping[str, Any], names: tuple[str, ...], place: str) -> tuple[str, Any]:
    """(name, value) of the first of the names that is there; one that is null only if no other is."""
    missing = object()
    there = [(name, value) for name in names if (value := lookup(fields, name, missing)) is not missing]
    if there:
        return next((pair for pair in there if pair[1] is not None), there[0])
    others = f" (or {', '.join(repr(name) for name in names[1:])})" if names[1:] else ""
    raise DataError(f"{place}: no field '{names[0]}'{others}; it has {', '.join(map(str, fields)) or 'none'}")


def _optional(fields: Mapping[str, Any], names: tuple[str, ...], place: str, kinds: tuple[type, ...] = (str,)) -> Any:
    """The first of the names that is there, neither null nor empty."""
    for name in names:
        value = lookup(fields, name)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "a text" if str in kinds else "a whole number"
            raise DataError(f"{place}: field '{name}' must be {wanted}, not {value!r:.200}")
        return value
    return None
