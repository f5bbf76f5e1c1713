"""Keeps the learner fed: which prompts are begun when, what became of each, and the groups that a step trains on.

One rule bounds everything: a prompt is begun only if, by the order of beginning, its turn comes within `max_lag` steps of the
weights that are current now. So there is never more than (max_lag + 1) steps' worth of work under way or unused, no response is
further behind than allowed, and with max_lag 0 a step's prompts are begun when the weights of the step before have arrived:
that is synchronous training, to the bit, because then units of work do not depend on what finished first.

Every prompt has exactly one fate: trained on, without signal, failed, or still pending; `record` and `state` tell.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpipe import interruption
from rlpipe.collection import GroupScoring, Harvest, Tally
from rlpipe.config import RunConfig
from rlpipe.errors import NoLiveGroups, RlpipeError, RolloutFailed, VerifierFailed
from rlpipe.monitor.monitor import Monitor
from rlpipe.objectives.objective import Objective
from rlpipe.rollout.pool import Group, RolloutPool
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool

log = logging.getLogger("rlpipe")

SAMPLING, JUDGING, LANDED = "sampling", "judging", "landed"
LOOK_S, EVERY_S = 1.0, 10.0  # how often a wait looks for signals, and says that it waits
PATIENCE = 2  # times that a late group is begun anew, before a step waits for it


@dataclass(slots=True, eq=False)
class Flight:
    """A prompt that was begun. index: in the source · order: of beginning · version: of the weights then · failure: why it
    could not be scored · live: the loss learns from it."""

    index: int
    order: int
    prompt: Prompt
    version: int
    state: str = SAMPLING
    group: Group | None = None
    failure: VerifierFailed | None = None
    live: bool = False
    unit: Any = None
    dropped: bool = False

    @property
    def oldest(self) -> int:
        return self.version if self.group is None else self.group.version

    @property
    def in_the_air(self) -> bool:
        return self.state != LANDED


@dataclass(slots=True)
class _Clock:
    """Time in which anything was sampled, and in which there was only judging."""

    sampling_s: float = 0.0
    judging_s: float = 0.0
    at: float = field(default_factory=time.perf_counter)
    doing: str = ""

    def tick(self, doing: str) -> None:
        now = time.perf_counter()
        if self.doing == SAMPLING:
            self.sampling_s += now - self.at
        elif self.doing == JUDGING:
            self.judging_s += now - self.at
        self.at, self.doing = now, doing


class Feed:
    """Waits for: rollout and verifier pools, whose threads call it back. Consumes: prompts from the cursor. Produces: a
    `Harvest` a step. All methods may be called from any thread; `take` and what changes the step, from the driver's alone.
    """

    def __init__(
        self,
        cfg: RunConfig,
        cursor: Any,
        rollouts: RolloutPool,
        verifiers: VerifierPool,
        objective: Objective,
        monitor: Monitor,
    ):
        self.cfg, self.algo, self.cursor, self.monitor = cfg, cfg.algo, cursor, monitor
        self.rollouts, self.verifiers = rollouts, verifiers
        self.scoring = GroupScoring(cfg, objective)
        self.max_lag = cfg.max_lag if cfg.mode == "async" else 0
        self.wanted = cfg.algo.prompts_per_step
        self.capacity = math.ceil(round(self.wanted * cfg.rollout.oversample, 6))
        self.hurried = self.capacity > self.wanted or cfg.rollout.order == "freshest"
        self.changed = threading.Condition(threading.RLock())
        self.step, self.version, self.order = 1, -1, 0
        self.places: dict[int, Flight] = {}  # by order: what the next steps will train on, or not
        self.spent: list[Flight] = []  # replaced by fresh prompts
        self.waiting: deque[int] = deque()  # indices of prompts to begin (anew) before fresh ones
        self.cuts: dict[int, int] = {}
        self.cut = 0
        self.error: Exception | None = None
        self._begin_step()

    def _begin_step(self) -> None:
        self.rounds = self.replaced = self.asked = self.judged = 0
        self.counters = EngineCounters()
        self.clock = _Clock(doing=getattr(self, "clock", _Clock()).doing)

    # --- what the driver calls --------------------------------------------------------------------------------------------

    def publish(self, version: int) -> None:
        """The rollout workers get (or have) these weights: more prompts may be begun."""
        with self.changed:
            self.version = version
            self._admit()

    def take(self, step: int) -> Harvest:
        """The groups of a step, as soon as they are there. Raises NoLiveGroups if none has a learning signal, VerifierFailed
        if too many groups failed, RolloutFailed for one that could not be sampled, Interrupted on SIGTERM."""
        started = said = time.monotonic()
        with self.changed:
            self.step = step
            interruption.check()
            self._admit()
            while not self._full():
                if time.monotonic() - said >= EVERY_S:
                    said = time.monotonic()
                    log.info(self._waiting_line(said - started))
                self.changed.wait(LOOK_S)
                interruption.check()
            if self.error is not None:
                raise self.error
            return self._finish_step(self._choose(), time.monotonic() - started)

    def abandon(self) -> None:
        """The run ends: no worker need finish what is under way. In `state` it is still without a fate."""
        with self.changed:
            for flight in self.places.values():
                self._drop(flight)

    def state(self) -> dict[str, Any]:
        """JSON-able: where the cursor is, and the prompts behind it whose fate no step has recorded; they are begun anew."""
        with self.changed:
            open_ones = [flight.index for flight in (*self.places.values(), *self.spent)]
            return {"cursor": self.cursor.state(), "pending": sorted({*self.waiting, *open_ones})}

    def restore(self, state: dict[str, Any], step: int) -> int:
        """Continue behind `step`; what is under way belongs to another past and is dropped. Returns how many groups."""
        with self.changed:
            lost = len(self.places) + len(self.spent)
            self.abandon()
            self.places.clear()
            self.spent.clear()
            self.cursor.restore(state["cursor"])
            self.waiting = deque(state.get("pending", ()))
            self.step, self.version, self.error = step + 1, -1, None
            self.cuts.clear()
            self._begin_step()
            return lost

    # --- beginning --------------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """Prompts that may be begun now."""
        steps = self.version + self.max_lag + 2 - self.step  # that these weights may serve, from the one being collected on
        left = self.cfg.steps - self.step + 1
        return self.capacity * min(steps, left) - len(self.places) if self.version >= 0 else 0

    def _admit(self) -> None:
        if self.error is not None:
            return
        room, in_the_air = self._room(), self._in_the_air()
        if self.max_lag == 0:
            again = self.rounds > 0 and (self.algo.groups != "refill" or self.rounds > self.algo.refill_rounds)
            if room > 0 and not in_the_air and not again:
                self._begin(room)
            return
        unit = self.rollouts.prompts_per_unit(self.algo.samples_per_prompt)
        while room > 0 and (room >= unit or not in_the_air or self.rollouts.hungry):
            self._begin(min(unit, room))
            room, in_the_air = self._room(), True

    def _begin(self, count: int) -> None:
        self.rounds += 1
        again = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        fresh = range(self.cursor.index, self.cursor.index + count - len(again))
        prompts = [self.cursor.source.prompt(index) for index in again] + self.cursor.take(len(fresh))
        flights = []
        for index, prompt in zip([*again, *fresh], prompts, strict=True):
            flights.append(Flight(index, self.order, prompt, self.version))
            self.places[self.order] = flights[-1]
            self.order += 1
        self._tick()
        samples = self.algo.samples_per_prompt
        units = self.rollouts.submit(
            prompts,
            samples,
            self.cfg.rollout.decoder,
            lambda place, group, counters: self._guarded(self._sampled, flights[place], group, counters),
            what=f"step {self.step}: sampling {count} prompts × {samples}",
            predictions=self.scoring.stride,
        )
        for indices, ticket in units:
            for place in indices:
                flights[place].unit = ticket

    # --- what the pools call ----------------------------------------------------------------------------------------------

    def _guarded(self, act: Callable, *args: Any) -> None:
        """An error in a pool's thread reaches whoever waits for the step."""
        with self.changed:
            try:
                act(*args)
            except Exception as error:
                self.error = self.error or error
            self._tick()
            self.changed.notify_all()

    def _sampled(self, flight: Flight, group: Group | RolloutFailed, counters: EngineCounters) -> None:
        if flight.dropped:
            return
        if isinstance(group, RolloutFailed):
            raise group
        self.counters = self.counters + counters
        flight.group, flight.state = group, JUDGING
        items = [(group.prompt, text) for text in self.scoring.texts(group)]
        asked, judged = self.verifiers.submit(items, lambda score: self._guarded(self._judged, flight, score))
        self.asked += asked
        self.judged += judged

    def _judged(self, flight: Flight, score: list[dict[str, float]] | VerifierFailed) -> None:
        if flight.dropped:
            return
        flight.state = LANDED
        if isinstance(score, VerifierFailed):  # the whole group goes; a failure is never a reward
            flight.failure = score
            self._check_failures()
        else:
            self.scoring.settle(flight.group, score)
            flight.live = self.algo.groups == "keep" or self.scoring.has_signal(flight.group)
        refills = self.max_lag == 0 or self.replaced < self.algo.refill_rounds * self.wanted
        if not flight.live and self.algo.groups == "refill" and refills:
            self.replaced += 1
            self.spent.append(self.places.pop(flight.order))
        self._admit()

    def _check_failures(self) -> None:
        begun = (*self.places.values(), *self.spent)
        failed = [flight for flight in begun if flight.failure is not None]
        if len(failed) > self.cfg.verifier.max_failed_groups * max(len(begun), self.wanted):
            raise VerifierFailed(
                f"step {self.step}: {len(failed)} of {len(begun)} groups could not be scored (limit "
                f"verifier.max_failed_groups={self.cfg.verifier.max_failed_groups:g}). Last cause: {failed[-1].failure}"
            )

    # --- ending a step ----------------------------------------------------------------------------------------------------

    def _full(self) -> bool:
        """The step's groups are there, or nothing more will come."""
        if self.error is not None or not self._in_the_air():
            return True
        if any(flight.in_the_air and self.cuts.get(flight.index, 0) >= PATIENCE for flight in self.places.values()):
            return False
        if self.hurried:
            return sum(not flight.in_the_air for flight in self.places.values()) >= self.wanted
        first = [self.places[order] for order in sorted(self.places)[: self.wanted]]
        return len(first) == self.wanted and not any(flight.in_the_air for flight in first)

    def _choose(self) -> list[Flight]:
        """What the step takes, in order of beginning."""
        landed = [flight for _, flight in sorted(self.places.items()) if not flight.in_the_air]
        if self.hurried:
            newest = self.cfg.rollout.order == "freshest"
            landed.sort(key=lambda f: (-self.cuts.get(f.index, 0), -f.oldest if newest else 0, f.order))
        return sorted(landed[: self.wanted], key=lambda flight: flight.order)

    def _finish_step(self, chosen: Sequence[Flight], waited_s: float) -> Harvest:
        step, taken = self.step, sorted([*chosen, *self.spent], key=lambda flight: flight.order)
        for flight in chosen:
            del self.places[flight.order]
        self.spent = []
        tally = self._tally(taken)
        for failure in tally.failed:
            self.monitor.warn(f"step {step}: {failure}")
        scored = [flight for flight in taken if flight.failure is None]
        self.cursor.solved((f.prompt, [part["reward"] for part in f.group.parts]) for f in scored)
        live = [flight for flight in chosen if flight.live]
        if not any(self.scoring.has_signal(flight.group) for flight in live):
            raise NoLiveGroups(self.scoring.nothing_to_learn(step, tally))
        lags = [step - 1 - flight.oldest for flight in live]
        if max(lags) > self.max_lag:
            raise RlpipeError(
                f"step {step}: a group is {max(lags)} versions old, max_lag is {self.max_lag}: a defect of rlpipe"
            )
        harvest = self.scoring.harvest([flight.group for flight in live], tally)
        harvest.lags = lags
        harvest.record = {
            "trained": [flight.index for flight in live],
            "without_signal": [flight.index for flight in scored if not flight.live],
            "failed": [flight.index for flight in taken if flight.failure is not None],
        }
        harvest.metrics |= self._metrics(waited_s)
        self.step = step + 1
        self._cut_late_ones()
        self._begin_step()
        self._admit()
        return harvest

    def _tally(self, taken: Sequence[Flight]) -> Tally:
        self._tick()
        return Tally(
            sampled=[flight.group for flight in taken if flight.failure is None],
            failed=[flight.failure for flight in taken if flight.failure is not None],
            rounds=self.rounds,
            asked=self.asked,
            judged=self.judged,
            counters=self.counters,
            sampling_s=self.clock.sampling_s,
            judging_s=self.clock.judging_s,
        )

    def _cut_late_ones(self) -> None:
        """Groups that the next step could no longer train on are begun anew, whole, with the seeds they had."""
        for order, flight in sorted(self.places.items()):
            if self.step - 1 - flight.oldest > self.max_lag:
                self.cut += 1
                self.cuts[flight.index] = self.cuts.get(flight.index, 0) + 1
                self._drop(self.places.pop(order))
                self.waiting.append(flight.index)
        self.cuts = {index: count for index, count in self.cuts.items() if index in self.waiting or self._flies(index)}

    def _drop(self, flight: Flight) -> None:
        """Whatever comes of it is ignored; a unit of which nothing is wanted any more ends."""
        flight.dropped = True
        others = (other for other in self.places.values() if other.unit is flight.unit and not other.dropped)
        if flight.state == SAMPLING and flight.unit is not None and not any(other.state == SAMPLING for other in others):
            self.rollouts.cancel(flight.unit)

    # --- telling ------------------------------------------------------------------------------------------------------------

    def _in_the_air(self) -> bool:
        return any(flight.in_the_air for flight in self.places.values())

    def _flies(self, index: int) -> bool:
        return any(flight.index == index for flight in self.places.values())

    def _tick(self) -> None:
        states = {flight.state for flight in self.places.values()}
        self.clock.tick(SAMPLING if SAMPLING in states else JUDGING if JUDGING in states else "")

    def _metrics(self, waited_s: float) -> dict[str, float]:
        under_way = sum(flight.in_the_air for flight in self.places.values())
        cut, self.cut = self.cut, 0
        return {
            "cluster/groups_under_way": float(under_way),
            "cluster/groups_ready": float(len(self.places) - under_way),
            "cluster/groups_begun_anew": float(cut),
            "cluster/units_waiting": float(self.rollouts.units_waiting),
            "perf/wait_s": waited_s,
        }

    def _waiting_line(self, waited_s: float) -> str:
        """While something is in the air."""
        states = [flight.state for flight in self.places.values()]
        oldest = min((flight for flight in self.places.values() if flight.in_the_air), key=lambda f: f.order)
        return (
            f"waiting for the groups of step {self.step}: {states.count(LANDED)}/{self.wanted} there, {states.count(SAMPLING)} "
            f"sampled, {states.count(JUDGING)} judged; the oldest is {oldest.prompt.uid}, {oldest.state} ({waited_s:.0f} s)"
        )
