"""Reading a timeline again, and the arithmetic on it: who was busy for which share of the time, and who at the same time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError
from rlpipe.monitor.timeline import NAME, OLD_NAME, ROLES, SESSION, place

Interval = tuple[float, float]
WAITING = "wait"  # how the name of a span begins that is no work
STEP = "step"  # name of the driver's span around a training step; its argument `step` has the number


@dataclass(frozen=True, slots=True)
class Span:
    """start, end: seconds since the epoch."""

    track: str
    name: str
    start: float
    end: float
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def role(self) -> str:
        return place(self.track)[0]

    @property
    def works(self) -> bool:
        return not self.name.startswith(WAITING)

    @property
    def succeeded(self) -> bool:
        return self.args.get("ok") is not False


@dataclass(slots=True)
class Trace:
    """spans and marks in order of their starts (a mark's end is its start) · starts: of the run and its resumptions ·
    damaged: lines that could not be read."""

    spans: list[Span] = field(default_factory=list)
    marks: list[Span] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    damaged: int = 0

    def tracks(self) -> list[str]:
        """In order of display."""
        return sorted({span.track for span in self.spans}, key=order)

    def by_track(self) -> dict[str, list[Span]]:
        """In order of display."""
        found: dict[str, list[Span]] = {track: [] for track in self.tracks()}
        for span in self.spans:
            found[span.track].append(span)
        return found

    def window(self) -> list[Interval]:
        """When the run ran: from the first to the last span of each start."""
        edges = [*self.starts, float("inf")] if self.starts else [float("-inf"), float("inf")]
        edges[0] = float("-inf")  # clocks of other nodes may be a little behind
        found = []
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            own = [span for span in self.spans if begin <= span.start < end]
            if own:
                found.append((own[0].start, max(span.end for span in own)))
        return union(found)

    def steps(self, first: int | None = None, last: int | None = None) -> list[Span]:
        """The driver's spans around training steps, from `first` to `last` where those are given; a step that was done again
        after a rollback is there twice."""
        low, high = float("-inf") if first is None else first, float("inf") if last is None else last
        spans = (span for span in self.spans if span.track == "driver" and span.name == STEP)
        return [span for span in spans if isinstance(span.args.get(STEP), int) and low <= span.args[STEP] <= high]


def working(spans: Sequence[Span], window: Sequence[Interval]) -> list[Interval]:
    """When a track with these spans worked, within the window: its spans, less those in which it waited."""
    work = union((span.start, span.end) for span in spans if span.works)
    waits = union((span.start, span.end) for span in spans if not span.works)
    return intersection(subtraction(work, waits), window)


def order(track: str) -> tuple[int, str, int]:
    """For sorting tracks: known roles first, workers by index."""
    role, index = place(track)
    return (ROLES.index(role) if role in ROLES else len(ROLES), role, index)


def has_trace(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in (NAME, OLD_NAME))


def read_trace(run_dir: Path) -> Trace:
    """The timeline in a run's folder, whatever state the run left it in. Raises CheckpointError if there is none."""
    trace, names = Trace(), {}
    if not has_trace(run_dir):
        raise CheckpointError(f"{run_dir} has no {NAME}; a run writes it unless monitor.timeline=false")
    for path in (run_dir / OLD_NAME, run_dir / NAME):
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        for line in lines:
            text = line.strip().rstrip(b",")
            if text in (b"", b"[", b"]"):
                continue
            try:
                _take(json.loads(text), trace, names)
            except (ValueError, TypeError, KeyError, AttributeError):
                trace.damaged += 1
    trace.spans.sort(key=lambda span: (span.start, -span.end))
    trace.marks.sort(key=lambda mark: mark.start)
    trace.starts.sort()
    return trace


def _take(event: dict[str, Any], trace: Trace, names: dict[tuple[int, int], str]) -> None:
    """One event of the file into the trace; names: of the tracks, by process and thread."""
    where, phase, args = (event["pid"], event["tid"]), event["ph"], dict(event.get("args", {}))
    if phase == "M":
        if event["name"] == "thread_name":
            names[where] = str(args["name"])
    elif phase == "X":
        start = float(event["ts"]) / 1e6
        trace.spans.append(Span(names[where], str(event["name"]), start, start + float(event["dur"]) / 1e6, args))
    elif phase == "i":
        at = float(event["ts"]) / 1e6
        if event.get("cat") == SESSION:
            trace.starts.append(at)
        else:
            trace.marks.append(Span(names[where], str(event["name"]), at, at, args))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals, in order; empty ones are left out."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Of two disjoint, ordered lists."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def subtraction(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """a without b; both disjoint and ordered."""
    edges = [float("-inf"), *(edge for interval in b for edge in interval), float("inf")]
    return intersection(a, list(zip(edges[::2], edges[1::2], strict=True)))


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
