"""Verdicts on programs: they run in cells, the judging happens outside of them.

An answer's functions and the tests never share a process, and a program's output is compared here; so neither an exit code, nor
anything printed, nor a patched module, nor an object with a mind of its own is ever taken for a verdict.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, BinaryIO, TypeVar

from rlpipe.errors import SandboxError
from rlpipe.sandbox import frames
from rlpipe.sandbox.cells import Cell, Cells
from rlpipe.sandbox.limits import Limits

HARMLESS = "pass"  # a program that defines nothing: tests that survive it are in order
NUMBER = re.compile(r"[+-]?(\d{1,60}\.?\d{0,60}|\.\d{1,60})([eE][+-]?\d{1,4})?", re.ASCII)
EXTRA_S = 5.0  # the tests' own processor time beyond the answer's wall clock: never the first to run out
SETTLE_S = 1.0  # between the end of a process's channel and the word that it ended
POLL_BYTES = 1 << 16
T = TypeVar("T")


class BrokenTests(SandboxError):
    """The tests themselves cannot be run, whatever the answer."""


class Lost(SandboxError):
    """A confined process ended, and not by what ran in it."""


@dataclass(frozen=True)
class Verdict:
    """passed · cause of a failure: syntax | wrong | timeout | output | ended · detail: for people · seconds of wall clock ·
    share of the tests that passed: 0 or 1 where the first failure ends them."""

    passed: bool
    cause: str = ""
    detail: str = ""
    seconds: float = 0.0
    share: float = 0.0


def judge_functions(cells: Cells, sources: Sequence[str], entry_point: str, tests: dict[str, Any], limits: Limits) -> Verdict:
    """The first of `sources` that compiles and defines entry_point, against tests (see `tester.judge`).

    Raises BrokenTests if the tests are wrong, SandboxError if the machinery is. When the tests' process dies, twice, while a
    harmless answer gets its verdict, the answer is what kills it, and fails.
    """
    for _ in range(2):
        verdict = _twice(cells, lambda: _judge_functions(cells, sources, entry_point, tests, limits))
        if verdict is not None:
            return verdict
    if _twice(cells, lambda: _judge_functions(cells, [HARMLESS], entry_point, tests, limits)) is None:
        raise BrokenTests("the process that runs the tests dies, whatever the answer")
    return Verdict(False, "ended", "it ends the process that runs the tests")


def _twice(cells: Cells, judge: Callable[[], T]) -> T:
    """Once more, with everything started anew, if a confined process was lost."""
    try:
        return judge()
    except Lost as error:
        cells.renew(error)
        return judge()


def _judge_functions(
    cells: Cells, sources: Sequence[str], entry_point: str, tests: dict[str, Any], limits: Limits
) -> Verdict | None:
    """None: the tests' process died without a verdict."""
    answer, tester = cells.take(), cells.take()
    started = time.monotonic()
    deadline = started + limits.deadline_s
    link, link_of_tests = socket.socketpair()
    role = {"role": "answer", "sources": list(sources), "entry_point": entry_point}
    try:
        with link, link_of_tests:
            _give(tester, {"role": "tests"} | tests, limits, (link_of_tests.fileno(),), limits.deadline_s + EXTRA_S)
            _give(answer, role, limits, (link.fileno(),), limits.cpu_s)
        failed = _uncompiled(answer, limits.cpu_s, deadline)
        if failed is not None:
            return Verdict(False, *failed, time.monotonic() - started)
        result = frames.receive(tester.control, 1.0, deadline)
        if result["gone"] and _out_of_time(answer, limits.cpu_s):
            told = f"more than {limits.cpu_s:g} s of processor time"
            return Verdict(False, "timeout", told, time.monotonic() - started, result["share"])
    except frames.Late:
        return Verdict(False, "timeout", f"no verdict within {limits.deadline_s:g} s", time.monotonic() - started)
    except (frames.Closed, frames.Malformed):
        return None
    finally:
        answer.end()
        tester.end()
    if result["verdict"] == "broken":
        raise BrokenTests(result["reason"])
    seconds = time.monotonic() - started
    if result["verdict"] == "passed":
        return Verdict(True, seconds=seconds, share=1.0)
    detail = "".join(c if c.isprintable() else "?" for c in result["reason"])
    return Verdict(False, "ended" if result["gone"] else "wrong", detail, seconds, result["share"])


def _out_of_time(cell: Cell, cpu_s: float) -> bool:
    """Whether a process that seems to be gone was ended for its processor time. Raises Lost if it was killed for anything else:
    no program can do that to itself, so it is the machine's doing, or its owner's."""
    try:
        status, used_s = cell.status(time.monotonic() + SETTLE_S)
    except frames.Late:
        return False  # alive: it only broke the protocol
    except frames.Closed:
        raise Lost("the process that watches a confined one died") from None
    if status == -signal.SIGKILL and used_s is not None and used_s < cpu_s - 0.5:
        raise Lost(
            f"a confined process was killed from outside after {used_s:.1f} s; if this machine runs out of memory, lower "
            "verifier.sandbox_limits.memory_mb or verifier.workers"
        )
    return status == -signal.SIGKILL


def _give(cell: Cell, job: dict[str, Any], limits: Limits, handles: tuple[int, ...], cpu_s: float) -> None:
    """Raises Lost: before it has its job, an inmate's end is not its program's doing."""
    try:
        cell.give(job | {"cpu_s": cpu_s, "reply_mb": limits.reply_mb}, handles, time.monotonic() + 60.0)
    except (frames.Closed, frames.Late) as error:
        raise Lost(f"a confined process did not take its job: {type(error).__name__} {error}") from None


def _uncompiled(cell: Cell, cpu_s: float, deadline: float) -> tuple[str, str] | None:
    """Why there is nothing to run, as cause and detail; None if the program compiled. Raises Late, Lost."""
    try:
        if frames.receive(cell.control, 1.0, deadline)["compiled"]:
            return None
        return "syntax", "no part of it is a Python program"
    except frames.Malformed as error:
        raise Lost(f"a confined process could not be closed: {error}") from None
    except frames.Closed:
        return "timeout" if _out_of_time(cell, cpu_s) else "ended", "compiling it ended the process"


def judge_program(cells: Cells, sources: Sequence[str], given: str, wanted: str, limits: Limits, tolerance: float) -> Verdict:
    """The program run once on `given` as standard input; right if it ends with status 0 and its output agrees with `wanted`.

    Raises SandboxError if the machinery fails.
    """
    return _twice(cells, lambda: _judge_program(cells, sources, given, wanted, limits, tolerance))


def _judge_program(cells: Cells, sources: Sequence[str], given: str, wanted: str, limits: Limits, tolerance: float) -> Verdict:
    room = limits.output_kb * 1024 + 2 * len(wanted.encode())
    cell = cells.take()
    started = time.monotonic()
    deadline = started + limits.deadline_s
    output, inner_output = os.pipe()
    try:
        try:
            with _file_of(given) as file:
                _give(cell, {"role": "program", "sources": list(sources)}, limits, (file.fileno(), inner_output), limits.cpu_s)
        finally:
            os.close(inner_output)
        failed = _uncompiled(cell, limits.cpu_s, deadline)
        if failed is not None:
            return Verdict(False, *failed, time.monotonic() - started)
        printed = _read(output, room, deadline)
        if printed is None:
            return Verdict(False, "output", f"it printed more than {room} bytes", time.monotonic() - started)
        status, _ = cell.status(deadline)
        if status == -signal.SIGKILL and _out_of_time(cell, limits.cpu_s):
            return Verdict(False, "timeout", f"more than {limits.cpu_s:g} s of processor time", time.monotonic() - started)
    except frames.Late:
        return Verdict(False, "timeout", f"not finished within {limits.deadline_s:g} s", time.monotonic() - started)
    except frames.Closed:
        raise Lost("the process that watches a confined one died") from None
    finally:
        cell.end()
        os.close(output)
    seconds = time.monotonic() - started
    if status:
        return Verdict(False, "ended", f"exit status {status}", seconds)
    if agrees(printed.decode(errors="replace"), wanted, tolerance):
        return Verdict(True, seconds=seconds, share=1.0)
    return Verdict(False, "wrong", f"printed {printed[:200]!r}", seconds)


def _file_of(text: str) -> BinaryIO:
    """A file in memory with this content, at its beginning, that can only be read."""
    data = text.encode("utf8", "surrogateescape")
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("input")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            return open(f"/proc/self/fd/{handle}", "rb")
    file = tempfile.TemporaryFile()
    file.write(data)
    file.flush()
    file.seek(0)
    return file


def _read(handle: int, most: int, deadline: float) -> bytes | None:
    """All that is written until the other end is closed; None if it is more than `most` bytes. Raises Late."""
    parts, size = [], 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([handle], [], [], left)[0]:
            raise frames.Late
        part = os.read(handle, POLL_BYTES)
        if not part:
            return b"".join(parts)
        size += len(part)
        if size > most:
            return None
        parts.append(part)


def agrees(printed: str, wanted: str, tolerance: float = 0.0) -> bool:
    """As LiveCodeBench compares: white space around the whole and around each line aside, the lines are equal, or their tokens
    are equal numbers. tolerance: numbers may differ by it, absolutely or relatively; 0 means exactly (1.0 equals 1)."""
    ours, theirs = ([line.strip() for line in text.strip().splitlines()] for text in (printed, wanted))
    if len(ours) != len(theirs):
        return False
    return all(a == b or _same_numbers(a.split(), b.split(), tolerance) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(ours: list[str], theirs: list[str], tolerance: float) -> bool:
    if len(ours) != len(theirs):
        return False
    return all(_same_number(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


def _same_number(ours: str, theirs: str, tolerance: float) -> bool:
    if tolerance and ours == theirs:
        return True
    if not NUMBER.fullmatch(ours) or not NUMBER.fullmatch(theirs):
        return False
    try:
        a, b = Decimal(ours), Decimal(theirs)
        return a == b or (tolerance > 0 and abs(a - b) <= Decimal(tolerance) * max(1, abs(b)))
    except InvalidOperation:
        return False
