"""One place in an actor pool: which actor holds it, what it is doing, and until when it may."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GONE, STARTING, IDLE, BUSY = "gone", "starting", "idle", "busy"


@dataclass(frozen=True, slots=True, eq=False)
class Preparation:
    """What an actor must have done before it gets work: a method with arguments, and a check of its reply (which raises).

    at_once: it is called beside a unit that is under way, and the actor finds its own moment; else it waits for the unit's end.
    rest: there is no work after it, until another preparation.
    """

    method: str
    args: tuple
    label: str
    timeout_s: float
    check: Callable[[Any], None] = lambda reply: None
    at_once: bool = False
    rest: bool = False


@dataclass(slots=True, eq=False)
class Slot:
    """Written by the pool's thread alone. began: of the unit, by time.time(); deadline, not_before: by time.monotonic()."""

    index: int
    name: str
    actor: Any = None
    ready: bool = False
    ticket: Any = None
    reference: Any = None  # of the unit, or of the first call of a starting actor
    began: float = 0.0
    deadline: float = float("inf")
    preparing: Any = None
    prepared: Preparation | None = None
    starts_in_a_row: int = 0
    restarted: bool = False
    not_before: float = 0.0
    _wanted: Preparation | None = field(default=None)
    _started: float = 0.0

    @property
    def state(self) -> str:
        if self.actor is None:
            return GONE
        if not self.ready:
            return STARTING
        return IDLE if self.ticket is None else BUSY

    @property
    def up(self) -> bool:
        return self.ready and self.actor is not None

    def references(self) -> list[Any]:
        """What the slot waits for."""
        return [reference for reference in (self.reference, self.preparing) if reference is not None]

    def start(self, actor: Any, timeout_s: float) -> None:
        self.actor, self.ready, self.prepared = actor, False, None
        self.starts_in_a_row += 1
        self._started = time.monotonic()
        self.reference, self.deadline = actor.pid.remote(), self._started + timeout_s

    def came_up(self) -> float:
        """Seconds that the start took."""
        self.reference, self.ready, self.deadline = None, True, float("inf")
        return time.monotonic() - self._started

    def prepare(self, wanted: Preparation, reference: Any) -> None:
        self._wanted, self.preparing = wanted, reference
        self.deadline = max(self.deadline if self.ticket else 0.0, time.monotonic() + wanted.timeout_s)

    def prepared_as(self, reply: Any) -> None:
        """Raises what the preparation's check raises."""
        self._wanted.check(reply)
        self.prepared, self.preparing = self._wanted, None
        if self.ticket is None:
            self.deadline = float("inf")

    def begin(self, ticket: Any, reference: Any) -> None:
        self.ticket, self.reference, self.began = ticket, reference, time.time()
        self.deadline = time.monotonic() + ticket.timeout_s
        self.starts_in_a_row = 0

    def doing(self) -> str:
        if self.ticket is not None:
            return self.ticket.call.label
        return self._wanted.label if self.preparing is not None else "its start"

    def gone(self, pause_s: float) -> None:
        """The actor is ended; the next may start in pause_s seconds."""
        self.actor = self.ticket = self.reference = self.preparing = self.prepared = self._wanted = None
        self.ready, self.restarted = False, True
        self.deadline, self.not_before = float("inf"), time.monotonic() + pause_s
