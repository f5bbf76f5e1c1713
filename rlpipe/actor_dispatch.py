"""The thread of an actor pool: hands units to actors, looks at what comes back, and replaces actors that are gone."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlpipe.actor_slot import BUSY, IDLE, Preparation, Slot
from rlpipe.cluster import fetch, finished
from rlpipe.errors import RlpipeError, WorkerLost

log = logging.getLogger("rlpipe")

EVERY_S = 10.0
START_ATTEMPTS = 3
IDLE_POLL_S, BUSY_POLL_S = 0.01, 0.1  # how soon new work is seen while some, or all, of the workers are busy
LONGEST_PAUSE_S = 30.0  # between two attempts to start a worker


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


Take = Callable[[Any, bool], None]


@dataclass(slots=True, eq=False)
class Ticket:
    """A unit that was handed in. take(result, more): called once with the result, or with each part and `more`, then None; or
    with a `Failure`."""

    call: Call
    take: Take
    timeout_s: float
    what: str
    key: tuple[int, int]
    attempts: list[str] = field(default_factory=list)
    last_slot: int = -1
    cancelled: bool = False

    def __lt__(self, other: Ticket) -> bool:
        return self.key < other.key


class Dispatcher:
    """What `ActorPool` says of itself, without the methods that others call. `changed` guards slots and waiting units; nothing
    that others handed in is called while it is held."""

    def __init__(
        self,
        make: Callable[[int], Any],
        size: int,
        *,
        name: str,
        retries: int,
        has_place: Callable[[int], bool] = lambda index: True,
        group: str = "",
        start_timeout_s: float = 300.0,
        spans: Callable[[int, str, float, float, bool], None] | None = None,
    ):
        self.make, self.name, self.retries, self.group = make, name, retries, group
        self.has_place, self.start_timeout_s, self.spans = has_place, start_timeout_s, spans
        self.restarts = self.retried = self.timeouts = 0
        self.busy_s = 0.0
        self.slots = [Slot(index, name) for index in range(size)]
        self.waiting: list[Ticket] = []
        self.preparation: Preparation | None = None
        self.broken: Exception | None = None
        self.changed = threading.Condition()
        self._numbers = itertools.count()
        self._in_a_row = 0  # starts since a unit was finished
        self._alive_at = time.monotonic()
        self._closing = False
        self._thread = threading.Thread(target=self._dispatch_until_closed, name=f"{name} pool", daemon=True)
        self._thread.start()

    def _dispatch_until_closed(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except Exception as error:  # a defect of ours, or Ray itself is gone: nobody may wait for ever
            if not self._closing:
                log.exception("the %s pool broke", self.name)
                self._give_up(error)

    def _turn(self) -> None:
        with self.changed:
            for slot in self.slots:
                self._advance(slot)
            watched = {reference: slot for slot in self.slots for reference in slot.references()}
            pause = self._pause(watched)
            if not watched and not self._closing:
                self.changed.wait(pause)
        if not watched:
            self._check_someone_is_alive()
            return
        for reference in finished(watched, pause, every=True):
            self._arrived(watched[reference], reference)
        now = time.monotonic()
        for slot in self.slots:
            if slot.references() and now >= slot.deadline:
                self._overdue(slot)

    def _pause(self, watched: dict) -> float:
        """Seconds that may pass before somebody has to be looked after."""
        busy = all(slot.state == BUSY for slot in self.slots)
        poll = EVERY_S if not watched else BUSY_POLL_S if busy else IDLE_POLL_S
        if any(slot.actor is None for slot in self.slots):
            poll = min(poll, 0.2)
        soonest = min((slot.deadline for slot in self.slots if slot.references()), default=float("inf"))
        return max(0.0, min(poll, soonest - time.monotonic()))

    def _advance(self, slot: Slot) -> None:
        """Whatever a slot can do next without waiting: start, prepare, take a unit."""
        if self.broken is not None:
            return
        if slot.actor is None:
            if time.monotonic() >= slot.not_before and self.has_place(slot.index):
                slot.start(self.make(slot.index), self.start_timeout_s)
            return
        self._alive_at = time.monotonic()
        wanted = self.preparation
        if wanted is not None and slot.prepared is not wanted and slot.preparing is None:
            if slot.state == IDLE or (slot.state == BUSY and wanted.at_once):
                slot.prepare(wanted, self._method(slot, wanted.method, self.group).remote(*wanted.args))
        if slot.state == IDLE and slot.preparing is None and (wanted is None or (slot.prepared is wanted and not wanted.rest)):
            ticket = self._next(slot)
            if ticket is not None:
                call = ticket.call
                slot.begin(ticket, self._method(slot, call.method, "").remote(*call.args, **call.kwargs))

    def _method(self, slot: Slot, name: str, group: str) -> Any:
        method = getattr(slot.actor, name)
        return method.options(concurrency_group=group) if group else method

    def _next(self, slot: Slot) -> Ticket | None:
        """The next unit for a slot: not one that just failed there, unless there is nowhere else."""
        passed = []
        found = None
        while self.waiting and found is None:
            ticket = heapq.heappop(self.waiting)
            if ticket.cancelled:  # between two attempts
                continue
            if ticket.last_slot != slot.index or sum(other.up for other in self.slots) == 1:
                found = ticket
            else:
                passed.append(ticket)
        for ticket in passed:
            heapq.heappush(self.waiting, ticket)
        return found

    def _arrived(self, slot: Slot, reference: Any) -> None:
        """A reference of the slot is done; one that the slot has let go of meanwhile no longer matters."""
        if reference not in slot.references():
            return
        try:
            if reference is slot.preparing:
                slot.prepared_as(self._value(slot, reference))
                with self.changed:
                    self.changed.notify_all()
            elif slot.ticket is None:
                self._started(slot, self._value(slot, reference))
            else:
                self._part(slot)
        except Exception as error:  # whatever user code raised: counted, retried, and in the end reported with its cause
            self._failed(slot, error, preparing=reference is slot.preparing)

    def _started(self, slot: Slot, pid: int) -> None:
        took = slot.came_up()
        if slot.restarted:
            log.warning("%s worker %d is back after %.1f s (process %d)", self.name, slot.index, took, pid)
        with self.changed:
            self.changed.notify_all()

    def _part(self, slot: Slot) -> None:
        ticket = slot.ticket
        result, more = self._next_part(slot)
        if more:
            slot.deadline = time.monotonic() + ticket.timeout_s
        else:
            self._in_a_row = 0
            self._ended(slot, True)
        if not ticket.cancelled:
            ticket.take(result, more)

    def _next_part(self, slot: Slot) -> tuple[Any, bool]:
        """(result, whether there may be more of it); None at the end of a generator."""
        import ray

        reference = slot.reference
        if isinstance(reference, ray.ObjectRefGenerator):
            try:
                reference = next(reference)
            except StopIteration:
                return None, False
        return self._value(slot, reference), reference is not slot.reference

    def _value(self, slot: Slot, reference: Any) -> Any:
        return fetch(reference, f"{self.name} worker {slot.index}")

    def _ended(self, slot: Slot, well: bool) -> None:
        label, began, now = slot.ticket.call.label, slot.began, time.time()
        self.busy_s += now - began
        with self.changed:
            slot.ticket = slot.reference = None
        if self.spans is not None:
            self.spans(slot.index, label, began, now, well)

    def _overdue(self, slot: Slot) -> None:
        if finished(slot.references(), 0.0):
            return
        self.timeouts += 1
        late = WorkerLost(f"{self.name} worker {slot.index} passed the deadline of {slot.doing()}")
        log.warning("%s", late, extra=self._incident("timeout", slot))
        self._failed(slot, late, preparing=slot.ticket is None)

    def _incident(self, kind: str, slot: Slot) -> dict[str, str]:
        """What lets a monitor count a line of the log."""
        return {"incident": kind, "track": f"{self.name} {slot.index}"}

    def _failed(self, slot: Slot, error: Exception, preparing: bool) -> None:
        """What the slot was doing went wrong: the unit is tried elsewhere, a worker that cannot be trusted is replaced."""
        ticket = slot.ticket
        line = f"{self.name} worker {slot.index}: {type(error).__name__}: {_last_line(error)}"
        replaced = preparing or ticket is None or isinstance(error, WorkerLost)
        if ticket is not None:
            self._ended(slot, False)
        if replaced:
            self._replace(slot, error, ticket)
        if ticket is not None and not ticket.cancelled:
            self._retry(ticket, slot, line, error)

    def _retry(self, ticket: Ticket, slot: Slot, line: str, error: Exception) -> None:
        ticket.attempts.append(line)
        if len(ticket.attempts) > self.retries:
            ticket.take(Failure(ticket.call.label, ticket.attempts, error), False)
            return
        self.retried += 1
        attempt = len(ticket.attempts)
        log.warning(
            "%s: attempt %d of %s failed: %s; trying again elsewhere",
            ticket.what,
            attempt,
            ticket.call.label,
            line,
            extra=self._incident("retry", slot),
        )
        ticket.last_slot = slot.index
        with self.changed:
            heapq.heappush(self.waiting, ticket)

    def _replace(self, slot: Slot, error: Exception, ticket: Ticket | None) -> None:
        """End the actor; a fresh one takes the slot when there is room. Too many starts without a unit done end the pool, but
        not while somebody can do one: a single bad machine is not the pool, however long the others have nothing to do."""
        import ray

        doing = f" while it did {ticket.call.label}" if ticket is not None else ""
        self._in_a_row += 1
        log.warning(
            "%s worker %d is replaced (restart %d of the pool)%s: %s",
            self.name, slot.index, self.restarts + 1, doing, error, extra=self._incident("restart", slot),
        )  # fmt: skip
        ray.kill(slot.actor)
        with self.changed:  # counted in the moment in which it is gone: who sees the one sees the other
            self.restarts += 1
            slot.gone(pause_before(slot.starts_in_a_row))
            self.changed.notify_all()
        if self._in_a_row > START_ATTEMPTS * len(self.slots) and not any(map(self._can_work, self.slots)):
            self._give_up(
                WorkerLost(
                    f"{self.name} workers were started anew {self._in_a_row} times without finishing anything; last: {error}"
                )
            )

    def _can_work(self, slot: Slot) -> bool:
        return slot.up and (self.preparation is None or slot.prepared is not None)

    def _check_someone_is_alive(self) -> None:
        silent = time.monotonic() - self._alive_at
        if self.broken is None and not self._closing and silent > START_ATTEMPTS * self.start_timeout_s:
            self._give_up(WorkerLost(f"no {self.name} worker has had a place for {silent:.0f} s: the cluster has no room left"))

    def _give_up(self, error: Exception) -> None:
        """Every unit fails with the cause; nobody waits for a pool that will not come back. Not under the lock: those who are
        told have locks of their own."""
        with self.changed:
            self.broken = error
            left = [*self.waiting, *(slot.ticket for slot in self.slots if slot.ticket is not None)]
            self.waiting.clear()
            self.changed.notify_all()
        cause = error if isinstance(error, RlpipeError) else WorkerLost(f"the {self.name} pool broke: {error}")
        for ticket in left:
            if not ticket.cancelled:
                ticket.take(Failure(ticket.call.label, [*ticket.attempts, str(cause)], cause), False)


def pause_before(starts: int) -> float:
    """Seconds until a worker is started anew that has been started so often without taking up a unit."""
    return min(LONGEST_PAUSE_S, 2.0 ** min(starts - 2, 10)) if starts > 1 else 0.0


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1][:300]
