"""incidents.jsonl: what went wrong in a run and what was done about it, over all of its starts. Nothing is ever cut from it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError
from rlpipe.monitor.files import append_line, jsonable

KINDS = {  # what happened: how often, as metrics and summary name it
    "restart": "restarts",  # a worker was replaced
    "retry": "retries",  # a unit of work was given to another worker
    "timeout": "timeouts",  # a worker passed its deadline
    "rollback": "rollbacks",  # the learner was lost: back to a checkpoint
    "resume": "resumes",  # the driver was lost or left: a later start goes on from a checkpoint
    "interruption": "interruptions",  # asked to leave (SIGTERM)
}
LOSSES = ("lost_steps", "lost_groups", "lost_seconds")


@dataclass(frozen=True, slots=True)
class Lost:
    """Finished work that is done again: training steps, groups of responses they trained on, seconds they took."""

    steps: int
    groups: int
    seconds: float

    def facts(self) -> dict[str, float]:
        return {"lost_steps": self.steps, "lost_groups": self.groups, "lost_seconds": round(self.seconds, 3)}

    def __str__(self) -> str:
        if not self.steps and not self.seconds:
            return "no finished step is done again"
        return f"{self.steps} steps ({self.groups} groups, {self.seconds:.1f} s) are done again"


def lost_work(dropped: Sequence[Mapping[str, Any]], since_s: float = 0.0) -> Lost:
    """What lines of metrics.jsonl that were dropped stand for; since_s: seconds of a step that was not logged yet."""
    done = [line for line in dropped if line["step"] > 0]
    groups = sum(int(line.get("rollout/groups") or 0) for line in done)
    return Lost(len(done), groups, sum(line.get("perf/step_s") or 0.0 for line in done) + since_s)


class IncidentLog:
    """Appends {"time", "step", "kind", "track", "text", …}, from any thread; starts with what earlier starts left.

    A line that cannot be written is told to `note`, once: it must not fail the work that it tells of.
    """

    def __init__(self, path: Path, *, fresh: bool, note: Callable[[str], None]):
        self.path, self._note, self._told = path, note, False
        self._lock = threading.Lock()
        self.totals = dict.fromkeys((*KINDS.values(), *LOSSES), 0)
        for line in [] if fresh else read_incidents(path):
            _add(self.totals, line)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._append("")  # a crash cut the last line short: what follows must not join it

    def add(self, kind: str, text: str, *, step: int, track: str, **facts: float) -> None:
        """step: the one under way. Raises ValueError for a kind not in KINDS: a mistake in the code that calls."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of incident: {', '.join(KINDS)}")
        line = {"time": round(time.time(), 3), "step": step, "kind": kind, "track": track, "text": text, **facts}
        with self._lock:
            _add(self.totals, line)
            self._append(json.dumps(jsonable(line), allow_nan=False))

    def _append(self, text: str) -> None:
        try:
            append_line(self.path, text)
        except CheckpointError as error:
            if not self._told:
                self._told = True
                self._note(str(error))


def read_incidents(path: Path) -> list[dict[str, Any]]:
    """Lines of incidents.jsonl, oldest first; those that a crash left broken are skipped, for none is worth a run."""
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append(line | {"time": float(line["time"]), "step": int(line["step"]), "kind": str(line["kind"])})
        except (ValueError, TypeError, KeyError):
            continue
    return lines


def totals(incidents: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Counts by kind, and the work lost altogether."""
    found: dict[str, float] = dict.fromkeys((*KINDS.values(), *LOSSES), 0)
    for line in incidents:
        _add(found, line)
    return found


def fault_line(totals: Mapping[str, Any]) -> str:
    """What went wrong and what it cost, for people; "" if nothing did."""
    parts = [f"{totals[name]:.0f} {name if totals[name] > 1 else kind}" for kind, name in KINDS.items() if totals.get(name)]
    if totals.get("lost_seconds"):
        parts.append(f"{totals['lost_steps']:.0f} steps or {totals['lost_seconds']:.1f} s of work done again")
    return ", ".join(parts)


def _add(found: dict[str, float], line: Mapping[str, Any]) -> None:
    if line["kind"] in KINDS:
        found[KINDS[line["kind"]]] += 1
    for key in LOSSES:
        value = line.get(key)
        found[key] += value if isinstance(value, int | float) else 0
