"""A pool of actors that loses nothing: units of work with deadlines, retried elsewhere, workers restarted and prepared."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpipe.cluster import fetch, finished, wait
from rlpipe.errors import RlpipeError, WorkerLost

log = logging.getLogger("rlpipe")


@dataclass(frozen=True, slots=True)
class Call:
    """One unit of work: a method of the actors and its arguments. label names it in the log. A method that is a generator gives
    its results part by part, and its deadline starts again with each."""

    method: str
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A unit that failed on every attempt. attempts: one line each; cause: the last exception."""

    label: str
    attempts: list[str]
    cause: Exception

    def __str__(self) -> str:
        return f"{self.label} failed {len(self.attempts)} times; last: {self.attempts[-1]}"


@dataclass(slots=True)
class _Slot:
    index: int
    actor: Any = None
    unit: int | None = None
    reference: Any = None
    deadline: float = 0.0


class ActorPool:
    """size actors made by make(index); one unit in flight on each.

    An actor that dies or passes a unit's deadline is replaced by a new one, on which `prepare(actor)` runs before it gets work;
    its unit goes to another actor. retries: further attempts of a unit after its first. Counters: restarts, retried, timeouts.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        size: int,
        *,
        name: str,
        retries: int,
        prepare: Callable[[Any], None] | None = None,
        start_timeout_s: float = 300.0,
    ):
        self.make, self.name, self.retries = make, name, retries
        self.prepare, self.start_timeout_s = prepare, start_timeout_s
        self.restarts = self.retried = self.timeouts = 0
        self.slots = [_Slot(index, make(index)) for index in range(size)]
        wait([slot.actor.pid.remote() for slot in self.slots], what=f"{size} {name} workers", timeout_s=start_timeout_s)

    def run(self, calls: Sequence[Call], *, timeout_s: float, what: str) -> list[Any]:
        """Results in the order of the calls; a `Failure` in place of those that never succeeded. timeout_s: of one attempt."""
        results: list[Any] = [None] * len(calls)
        for index, result in self.stream(calls, timeout_s=timeout_s, what=what):
            results[index] = result
        return results

    def stream(self, calls: Sequence[Call], *, timeout_s: float, what: str) -> Iterator[tuple[int, Any]]:
        """(index, result) in order of completion; every call exactly once. Generators: (index, part) for each part, and
        (index, None) at the end; a unit that is tried again gives all its parts again, so the caller keeps one of each."""
        job = _Job(calls, what, time.monotonic())
        while job.open:
            self._dispatch(job, timeout_s)
            for slot in self._ready(job, timeout_s):
                yield from self._collect(slot, job, timeout_s)

    def _dispatch(self, job: _Job, timeout_s: float) -> None:
        for slot in self.slots:
            if slot.unit is not None or not job.queue:
                continue
            unit = job.take(slot.index, alone=len(self.slots) == 1)
            if unit is None:
                continue
            call = job.calls[unit]
            slot.unit, slot.deadline = unit, time.monotonic() + timeout_s
            slot.reference = getattr(slot.actor, call.method).remote(*call.args, **call.kwargs)

    def _ready(self, job: _Job, timeout_s: float) -> list[_Slot]:
        """Slots whose unit is finished or overdue; waits for at least one, with a line every ten seconds."""
        busy = {slot.reference: slot for slot in self.slots if slot.unit is not None}
        while True:
            now = time.monotonic()
            soonest = min(slot.deadline for slot in busy.values())
            done = finished(busy, min(EVERY_S, soonest - now))
            if done:
                return [busy[reference] for reference in done]
            overdue = [slot for slot in busy.values() if time.monotonic() >= slot.deadline]
            if overdue:
                return overdue
            log.info("waiting for %s: %d/%d (%.0f s)", job.what, job.finished, len(job.calls), time.monotonic() - job.started)

    def _collect(self, slot: _Slot, job: _Job, timeout_s: float) -> Iterator[tuple[int, Any]]:
        unit, label = slot.unit, job.calls[slot.unit].label
        overdue = time.monotonic() >= slot.deadline and not finished([slot.reference], 0.0)
        slot.unit = None
        try:
            if overdue:
                self.timeouts += 1
                raise WorkerLost(f"{self.name} worker {slot.index} passed the deadline of {label}")
            result, more = self._fetch(slot)
        except Exception as error:  # whatever user code raised: counted, retried, and in the end reported with its cause
            if isinstance(error, WorkerLost):
                self._replace(slot, error)
            failure = self._retry(slot, unit, label, error, job)
            if failure is not None:
                job.close(unit)
                yield unit, failure
            return
        if more:
            slot.unit, slot.deadline = unit, time.monotonic() + timeout_s
        else:
            job.close(unit)
        yield unit, result

    def _fetch(self, slot: _Slot) -> tuple[Any, bool]:
        """(result, whether there may be more of it); None at the end of a generator."""
        import ray

        reference = slot.reference
        if isinstance(reference, ray.ObjectRefGenerator):
            try:
                reference = next(reference)
            except StopIteration:
                return None, False
        result = fetch(reference, f"{self.name} worker {slot.index}")
        return result, reference is not slot.reference

    def _retry(self, slot: _Slot, unit: int, label: str, error: Exception, job: _Job) -> Failure | None:
        attempts = job.attempts[unit]
        attempts.append(f"{self.name} worker {slot.index}: {type(error).__name__}: {str(error).strip().splitlines()[-1][:300]}")
        if len(attempts) > self.retries:
            return Failure(label, attempts, error)
        self.retried += 1
        log.warning("%s: attempt %d of %s failed: %s; trying again elsewhere", job.what, len(attempts), label, attempts[-1])
        job.give_back(unit, slot.index)
        return None

    def _replace(self, slot: _Slot, error: Exception) -> None:
        """A fresh actor in the slot, prepared. Raises WorkerLost if none comes up within the start deadline."""
        import ray

        ray.kill(slot.actor)
        for attempt in range(1, START_ATTEMPTS + 1):
            self.restarts += 1
            log.warning("%s worker %d is replaced (attempt %d): %s", self.name, slot.index, attempt, error)
            slot.actor = self.make(slot.index)
            try:
                wait(
                    [slot.actor.pid.remote()], what=f"{self.name} worker {slot.index} to start", timeout_s=self.start_timeout_s
                )
                if self.prepare is not None:
                    self.prepare(slot.actor)
                return
            except RlpipeError as failed:
                error = failed
                ray.kill(slot.actor)
        raise WorkerLost(
            f"{self.name} worker {slot.index} did not come back after {START_ATTEMPTS} attempts: {error}"
        ) from error

    def broadcast(self, method: str, *args: Any, timeout_s: float, what: str) -> list[Any]:
        """The method on every actor, results in order of the actors; dead ones are replaced (and prepared) first."""
        references = [getattr(slot.actor, method).remote(*args) for slot in self.slots]
        results = []
        for slot, reference in zip(self.slots, references, strict=True):
            try:
                results += wait([reference], what=what, timeout_s=timeout_s)
            except WorkerLost as error:
                self._replace(slot, error)
                results += wait([getattr(slot.actor, method).remote(*args)], what=what, timeout_s=timeout_s)
        return results

    def close(self) -> None:
        import ray

        for slot in self.slots:
            ray.kill(slot.actor)


EVERY_S = 10.0
START_ATTEMPTS = 3


class _Job:
    """The units of one `stream`: which wait, which were tried where, which are closed."""

    def __init__(self, calls: Sequence[Call], what: str, started: float):
        self.calls, self.what, self.started = calls, what, started
        self.queue: deque[int] = deque(range(len(calls)))
        self.open = set(range(len(calls)))
        self.attempts: list[list[str]] = [[] for _ in calls]
        self.last_slot: dict[int, int] = {}

    @property
    def finished(self) -> int:
        return len(self.calls) - len(self.open)

    def take(self, slot: int, alone: bool) -> int | None:
        """The next unit for a slot: not one that just failed there, unless there is nowhere else."""
        for unit in self.queue:
            if alone or self.last_slot.get(unit) != slot:
                self.queue.remove(unit)
                return unit
        return None

    def give_back(self, unit: int, slot: int) -> None:
        self.last_slot[unit] = slot
        self.queue.append(unit)

    def close(self, unit: int) -> None:
        self.open.discard(unit)
