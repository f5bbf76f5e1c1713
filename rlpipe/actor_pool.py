"""A pool of actors that loses nothing: units of work with deadlines, retried elsewhere, workers restarted and prepared.

One thread of the pool's own talks to the actors; everybody else hands in units and gets results by callback or by iterating. A
worker that dies is replaced while the others work on, and one whose machine has not come up yet joins when it has.
"""

from __future__ import annotations

import heapq
import logging
import queue
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rlpipe.actor_dispatch import EVERY_S, START_ATTEMPTS, Call, Dispatcher, Failure, Take, Ticket
from rlpipe.actor_slot import IDLE, Preparation
from rlpipe.cluster import wait
from rlpipe.errors import WaitTimeout, WorkerLost

__all__ = ["ActorPool", "Call", "Failure", "Ticket", "next_of"]
log = logging.getLogger("rlpipe")


class ActorPool(Dispatcher):
    """size actors made by make(index); one unit in flight on each. All methods may be called from any thread.

    An actor that dies or passes a unit's deadline is replaced by a new one, which is prepared before it gets work; its unit
    goes to another actor. retries: further attempts of a unit after its first. minimum: actors that must be up for the pool to
    start (0: all); the others join later. has_place(index): whether there is room for an actor now. group: the concurrency
    group of calls that must not wait for a unit. spans: told (worker, unit, start, end, whether it went well) of every unit, in
    seconds of time.time(). Counters: restarts, retried, timeouts; busy_s: seconds of work, over all actors.
    """

    def __init__(self, make, size: int, *, minimum: int = 0, **settings: Any):
        super().__init__(make, size, **settings)
        self._wait_for_first(minimum or size)

    def _wait_for_first(self, wanted: int) -> None:
        """Raises WorkerLost if the first actors do not come up."""
        started = time.monotonic()
        limit = START_ATTEMPTS * self.start_timeout_s
        with self.changed:
            while sum(slot.up for slot in self.slots) < wanted:
                waited = time.monotonic() - started
                if self.broken is not None or waited > limit:
                    self._closing = True
                    cause = self.broken or WorkerLost(f"{wanted} {self.name} workers did not come up in {limit:.0f} s")
                    raise WorkerLost(str(cause)) from cause
                if not self.changed.wait(min(EVERY_S, limit - waited + 0.01)):
                    up = sum(slot.up for slot in self.slots)
                    log.info("waiting for %s workers: %d/%d (%.0f s of %.0f s)", self.name, up, wanted, waited + EVERY_S, limit)

    # --- work -----------------------------------------------------------------------------------------------------------

    def submit(self, call: Call, take: Take, *, timeout_s: float, what: str, urgency: int = 1) -> Ticket:
        """Hand in a unit; `take` gets its results on the pool's thread and must be quick. timeout_s: of one attempt. urgency:
        lower goes first. Raises WorkerLost if the pool has given up."""
        with self.changed:
            if self.broken is not None:
                raise WorkerLost(str(self.broken)) from self.broken
            ticket = Ticket(call, take, timeout_s, what, (urgency, next(self._numbers)))
            heapq.heappush(self.waiting, ticket)
            self.changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket, abort: str = "") -> None:
        """Its results are no longer wanted. abort: a method of the actor that ends the unit early, called with its label."""
        with self.changed:
            ticket.cancelled = True
            if ticket in self.waiting:
                self.waiting.remove(ticket)
                heapq.heapify(self.waiting)
            for slot in self.slots:
                if slot.ticket is ticket and abort:
                    self._method(slot, abort, self.group).remote(ticket.call.label)

    def run(self, calls: Sequence[Call], *, timeout_s: float, what: str) -> list[Any]:
        """Results in the order of the calls; a `Failure` in place of those that never succeeded. timeout_s: of one attempt."""
        results: list[Any] = [None] * len(calls)
        for index, result in self.stream(calls, timeout_s=timeout_s, what=what):
            results[index] = result
        return results

    def stream(self, calls: Sequence[Call], *, timeout_s: float, what: str) -> Iterator[tuple[int, Any]]:
        """(index, result) in order of completion; every call exactly once. Generators: (index, part) for each part, and
        (index, None) at the end; a unit that is tried again gives all its parts again, so the caller keeps one of each."""
        arrived: queue.SimpleQueue = queue.SimpleQueue()
        tickets = [
            self.submit(
                call,
                lambda result, more, i=i: arrived.put((i, result, more)),
                timeout_s=timeout_s,
                what=what,
                urgency=0,
            )
            for i, call in enumerate(calls)
        ]
        left = set(range(len(calls)))
        try:
            while left:
                index, result, more = next_of(arrived, what, len(calls) - len(left), len(calls))
                if not more:
                    left.discard(index)
                yield index, result
        finally:
            for index in left:  # the caller stopped listening
                self.cancel(tickets[index])

    def each(self, method: str, *args: Any, timeout_s: float, what: str) -> dict[int, Any]:
        """The method on every actor that is up, beside its unit: {worker: reply}. One that dies on the way, or does not answer
        in time, has no reply; without a `group` only those are asked that have no unit. timeout_s: for all of them."""
        with self.changed:
            slots = [slot for slot in self.slots if slot.up and (self.group or slot.state == IDLE)]
            asked = {slot.index: self._method(slot, method, self.group).remote(*args) for slot in slots}
        replies, ends = {}, time.monotonic() + timeout_s
        for index, reference in asked.items():
            try:
                left = max(0.1, ends - time.monotonic())
                (replies[index],) = wait([reference], what=f"{what} ({self.name} worker {index})", timeout_s=left)
            except (WorkerLost, WaitTimeout) as error:
                log.warning("%s: %s", what, error)  # its unit finds out, and the worker is replaced
        return replies

    def any(self, method: str, *args: Any, timeout_s: float, what: str) -> Any:
        """The reply of one actor that is up, beside its unit; the next is asked if it does not come. timeout_s: of each. Raises
        WorkerLost if none answers."""
        asked = [slot.index for slot in self.slots if slot.up]
        for worker in asked:
            try:
                asked_of = f"{what} ({self.name} worker {worker})"
                return wait([self.ask(worker, method, *args)], what=asked_of, timeout_s=timeout_s)[0]
            except (WorkerLost, WaitTimeout) as error:
                log.warning("%s: %s", what, error)
        raise WorkerLost(f"{what}: none of {len(asked)} {self.name} workers that are up answered")

    def ask(self, worker: int, method: str, *args: Any, replies: int = 1) -> Any:
        """Reference(s) to what a method of one actor returns, beside its unit."""
        with self.changed:
            actor = self.slots[worker].actor
            if actor is None:
                raise WorkerLost(f"{self.name} worker {worker} is gone")
            return getattr(actor, method).options(concurrency_group=self.group, num_returns=replies).remote(*args)

    # --- preparations ---------------------------------------------------------------------------------------------------

    def prepare(self, preparation: Preparation) -> None:
        """From now on no actor gets work before this was done on it; `Preparation` says whether that may disturb a unit."""
        with self.changed:
            self.preparation = preparation
            self.changed.notify_all()

    def wait_prepared(self, timeout_s: float) -> None:
        """Until all actors that are up have had the current preparation, at least one. Raises WaitTimeout, WorkerLost."""
        wanted, started = self.preparation, time.monotonic()
        with self.changed:
            while not self._is_prepared(wanted):
                if self.broken is not None:
                    raise WorkerLost(str(self.broken)) from self.broken
                waited = time.monotonic() - started
                if waited > timeout_s:
                    raise WaitTimeout(f"{wanted.label}: not on all {self.name} workers after {timeout_s:.0f} s")
                if not self.changed.wait(min(EVERY_S, timeout_s - waited + 0.01)):
                    log.info("waiting for %s (%.0f s of %.0f s)", wanted.label, waited + EVERY_S, timeout_s)

    def _is_prepared(self, wanted: Preparation) -> bool:
        up = [slot for slot in self.slots if slot.up]
        return bool(up) and all(slot.prepared is wanted or self.preparation is not wanted for slot in up)

    # --- counts ---------------------------------------------------------------------------------------------------------

    @property
    def idle(self) -> int:
        """Actors that could start a unit now."""
        return sum(slot.state == IDLE for slot in self.slots)

    @property
    def up(self) -> int:
        """Actors that are alive and prepared or about to be."""
        return sum(slot.up for slot in self.slots)

    def close(self) -> None:
        """End the actors and the thread; what was not finished is never answered."""
        import ray

        with self.changed:
            self._closing = True
            self.changed.notify_all()
        self._thread.join(timeout=30)
        for slot in self.slots:
            if slot.actor is not None:
                ray.kill(slot.actor)


def next_of(arrived: queue.SimpleQueue, what: str, done: int, of: int) -> Any:
    """The next of a pool's results, with a line while none comes; every unit has its own deadline, so one does come."""
    started = time.monotonic()
    while True:
        try:
            return arrived.get(timeout=EVERY_S)
        except queue.Empty:
            log.info("waiting for %s: %d/%d (nothing new for %.0f s)", what, done, of, time.monotonic() - started)
