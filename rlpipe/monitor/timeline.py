"""timeline.json: what every worker did when, as a trace that chrome://tracing and ui.perfetto.dev open.

The file is a JSON array of events, one a line (the Trace Event Format's array form, where a missing `]` is allowed, so a run
that was killed leaves a trace as well). Times are those of the wall clock: a run that is resumed goes on in the same file.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlpipe.monitor.files import jsonable

NAME, OLD_NAME = "timeline.json", "timeline.old.json"
ROLES = ("driver", "learner", "value", "rollout", "verifier", "weights", "checkpoint", "judge", "guide")  # order of display
LIMIT_MB = 32
BUFFERED = 200_000  # events between two writes; more means that the disk does not keep up, and they are left out
TAIL = 2**20  # bytes looked through for the last whole event of an earlier start
SESSION = "session"  # category of the mark that opens each start of the run

Event = tuple[str, str, str, float, float, dict[str, Any]]  # phase, track, name, start, end, arguments


class Timeline:
    """Spans, marks and counts on named tracks, from any thread; writing happens in a thread of its own.

    A track is a role, or a role and an index: "learner", "rollout 3". Spans of one track nest or follow one another. A span
    whose name starts with "wait" is no work. path: None writes nothing. heard(track, name, start, end) is told every span.
    limit_mb: of the file and the one before it together: at half of it the file is moved to timeline.old.json, in place of
    that. What cannot be written costs the timeline, not the run: `warn` hears it once.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        warn: Callable[[str], None],
        heard: Callable[[str, str, float, float], None] | None = None,
        limit_mb: float = LIMIT_MB,
        every_s: float = 1.0,
    ):
        self.path, self.limit, self.every_s, self.left_out = path, int(limit_mb * 2**20), every_s, 0
        self._warn, self._heard = warn, heard
        self._events: deque[Event] = deque()
        self._writing = threading.Lock()
        self._nested = threading.local()  # tracks of the blocks that a thread is in
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._named: set[str] = set()  # tracks that the current file has names for
        self._opened = path is None
        if path is not None:
            self._events.append(("i", "driver", "start of the run", time.time(), 0.0, {"cat": SESSION}))

    def span(self, track: str, name: str, start: float, end: float, **args: Any) -> None:
        """One piece of work, told when it is over. start, end: time.time(), in seconds. args: version, step, tokens, ok …"""
        if self._heard is not None:
            self._heard(track, name, start, end)
        self._add("X", track, name, start, end, args)

    @contextmanager
    def timed(self, track: str, name: str, **args: Any) -> Iterator[dict[str, Any]]:
        """The block as a span; what is put into the yielded dict joins its arguments. A block that raises is marked.

        A block inside another of its track and thread begins a microsecond later and ends one earlier, so that viewers can
        tell which is inside which."""
        start, more = time.time(), dict(args)
        open_blocks: list[str] = self._nested.__dict__.setdefault("tracks", [])
        inside = open_blocks.count(track) * 1e-6
        open_blocks.append(track)
        try:
            yield more
        except BaseException as error:
            more |= {"ok": False, "error": type(error).__name__}
            raise
        finally:
            open_blocks.remove(track)
            self.span(track, name, start + inside, max(start + inside, time.time() - inside), **more)

    def mark(self, track: str, name: str, at: float | None = None, **args: Any) -> None:
        """Something that happened at one moment: a restart, a rollback."""
        self._add("i", track, name, time.time() if at is None else at, 0.0, args)

    def count(self, name: str, at: float | None = None, **values: float) -> None:
        """Numbers drawn over time: the depths of the queues."""
        self._add("C", "driver", name, time.time() if at is None else at, 0.0, values)

    def flush(self) -> None:
        """Write what was told so far."""
        with self._writing:
            if self.path is None or not self._events:
                return
            try:
                self._write()
            except OSError as error:
                self._warn(f"{self.path} cannot be written ({error.strerror or error}); the timeline of this run ends here")
                self.path = None
                self._events.clear()

    def close(self) -> None:
        """Write the rest and complete the file; further events are dropped."""
        self._stop.set()
        if self._thread is None:
            return  # nothing was told but that the run started
        self._thread.join()
        self.flush()
        with self._writing:
            if self.path is not None:
                try:
                    _complete(self.path)
                except OSError as error:
                    self._warn(f"{self.path} cannot be completed ({error.strerror or error}); readers manage without")
                self.path = None
        if self.left_out:
            self._warn(f"{self.left_out} events are missing in the timeline: not written in time, or not writable")

    def _add(self, phase: str, track: str, name: str, start: float, end: float, args: dict[str, Any]) -> None:
        if self.path is None:
            return
        if not (math.isfinite(start) and math.isfinite(end)) or len(self._events) >= BUFFERED:
            self.left_out += 1
            return
        self._events.append((phase, track, name, start, end, args))
        if self._thread is None:
            self._start()

    def _start(self) -> None:
        with self._writing:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="timeline", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            self.flush()

    def _write(self) -> None:
        if not self._opened:
            _repair(self.path)
            self._opened = True
        lines: list[str] = []
        while self._events:
            event = self._events.popleft()
            if event[1] not in self._named:
                self._named.add(event[1])
                lines += _names(event[1])
            try:
                lines.append(_line(*event))
            except (TypeError, ValueError, RecursionError):  # arguments that are no data
                self.left_out += 1
        empty = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("ab") as file:
            file.write((("[\n" if empty else ",\n") + ",\n".join(lines)).encode())
            size = file.tell()
        if size >= self.limit // 2:
            _complete(self.path)
            os.replace(self.path, self.path.with_name(OLD_NAME))
            self._named = set()


def place(track: str) -> tuple[str, int]:
    """Role and index: "rollout 3" is ("rollout", 3), "learner" is ("learner", 0)."""
    role, _, index = track.rpartition(" ")
    return (role, int(index)) if role and index.isdecimal() else (track, 0)


def _numbers(track: str) -> dict[str, int]:
    """A process a role and a thread a worker, the same in every start. Threads have numbers of their own, not 0 and no other
    process's: Perfetto would take them for one."""
    role, index = place(track)
    process = ROLES.index(role) + 1 if role in ROLES else 100 + zlib.crc32(role.encode()) % 1900
    return {"pid": process, "tid": process * 10**6 + index + 1}


def _names(track: str) -> list[str]:
    numbers = _numbers(track)
    facts = (
        ("process_name", {"name": place(track)[0]}),
        ("process_sort_index", {"sort_index": numbers["pid"]}),
        ("thread_name", {"name": track}),
        ("thread_sort_index", {"sort_index": numbers["tid"]}),
    )
    return [json.dumps({"name": name, "ph": "M", **numbers, "args": args}) for name, args in facts]


def _line(phase: str, track: str, name: str, start: float, end: float, args: dict[str, Any]) -> str:
    """One event; times in whole microseconds, both ends rounded alike: spans that only touch must not overlap in the file, for
    Perfetto leaves out the second of two that do."""
    at = math.floor(start * 1e6)
    event: dict[str, Any] = {"name": name, "ph": phase, **_numbers(track), "ts": at}
    args = jsonable(args)
    if phase == "X":
        event["dur"] = max(0, math.floor(end * 1e6) - at)
        if args.get("ok") is False:
            event["cname"] = "terrible"  # red where the viewer knows the name
    elif phase == "i":
        event["s"] = "p" if track == "driver" else "t"  # of the process or of the thread
        if "cat" in args:
            event["cat"] = args.pop("cat")
    if args:
        event["args"] = args
    return json.dumps(event, default=str, allow_nan=False)


def _repair(path: Path) -> None:
    """Cut an earlier start's file back to its last whole event, so that more can follow."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(0, size - TAIL)
        file.seek(begin)
        tail = file.read()
        end = len(tail)
        while end > 0:
            start = tail.rfind(b"\n", 0, end) + 1
            text = tail[start:end].rstrip(b", \r")
            if text.startswith(b"{") and _is_event(text):
                file.truncate(begin + start + len(text))
                return
            end = start - 1
        if begin == 0:
            file.truncate(0)  # not one event in it
            return
    os.replace(path, path.with_name(OLD_NAME))  # damaged far back: kept as it is, for the reader to make out


def _is_event(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _complete(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n]\n")
