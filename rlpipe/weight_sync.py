"""The policy's current weights on every rollout worker, by the fastest way there is, and always by the object store in the end.

A version first goes by broadcast or shared memory where those serve; it is a shortcut that may fail. What counts is the version
in the object store that the pool is given last: a worker that has it already takes nothing, one that missed it or starts later
loads it, and all end with its version and checksum.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from dataclasses import replace
from typing import Any, Protocol

from rlpipe.cluster import wait
from rlpipe.config import RunConfig
from rlpipe.errors import ClusterError, LearnerLost
from rlpipe.learner.exporting import ADAPTERS, BASE, BROADCAST, SHARED, WHOLE, Order, Receipt
from rlpipe.models.weights import Layout, combined
from rlpipe.transport.meeting import first_line
from rlpipe.transport.store import Stored
from rlpipe.transport.update import Facts, WeightUpdate

log = logging.getLogger("rlpipe")

STORE, AUTO = "store", "auto"
KEEP_ATTEMPTS = 5  # of every worker, to put a version into the object store for later ones
LONGEST_PAUSE_S = 10.0  # between two of them
DEADLINE_S = 60.0  # of every wait inside a broadcast or of shared memory; past it a version goes through the store


class Learner(Protocol):
    """What is needed of the learner's ranks: `rlpipe.learner.exporting.ExportingRanks`."""

    def weights_facts(self) -> tuple[Facts, bool]: ...
    def weights_plan(self, contents: str) -> tuple[Layout, dict[str, float]]: ...
    def put_weights(self, contents: str, buckets: int) -> tuple[tuple, Receipt]: ...
    def prepare_weights(self, order: Order) -> Any: ...
    def send_weights(self, contents: str) -> list: ...
    def sent_weights(self, pending: list) -> Receipt: ...


class Rollouts(Protocol):
    """What is needed of the pool. `put_weights`: references to what `Receiver.put` of one worker gives, and to their number."""

    def set_weights(self, update: WeightUpdate, *, wait: bool) -> None: ...
    def each(self, method: str, *args: Any, timeout_s: float, what: str) -> dict[int, Any]: ...
    def put_weights(self, worker: int, version: int, layout: Layout) -> list: ...


class WeightSync:
    """Call `publish` from one thread. fallbacks: versions that did not get through by their first way; groups: process groups
    made for broadcasts; receipt: of the last export."""

    def __init__(self, cfg: RunConfig, learner: Learner, rollouts: Rollouts):
        self.cfg, self.learner, self.rollouts = cfg.rollout, learner, rollouts
        # Workers that finish their units first would all wait for the slowest, and the learner with them.
        self.collective = cfg.mode == "sync" or cfg.rollout.partial
        self.fallbacks = self.groups = 0
        self.receipt: Receipt | None = None
        self._lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """The learner's ranks are new ones: what they were to send by, and what workers hold from them, counts no more."""
        self._plans: dict[str, tuple[Layout, dict[str, float]]] = {}
        self._base: WeightUpdate | None = None
        self._group, self._members = "", 0
        self._learner: tuple[Facts, bool] | None = None
        with self._lock:
            self._newest = object()

    def publish(self, version: int, wait: bool = True) -> dict[str, float]:
        """Send the learner's weights as `version` to all workers, and keep them for later ones; metrics. wait: return when all
        workers have it; otherwise when their next units will.

        Raises WeightMismatch, WorkerLost and WaitTimeout when the workers do not end with it, LearnerLost when a rank died.
        """
        started, fallbacks = time.monotonic(), self.fallbacks
        with self._lock:  # from now on nobody gives the pool an older one, be it of the same number
            self._newest = object()
        if self._learner is None:
            self._learner = self.learner.weights_facts()
        contents = ADAPTERS if self._learner[1] else WHOLE
        base = self._stored_base() if contents == ADAPTERS else None
        layout, scalings = self._plan(contents)
        update = WeightUpdate(version, layout, scalings=scalings, base=base)
        moved = layout.nbytes + (base.layout.nbytes if base and self._base is not base else 0)
        self._base = base
        update, watch = self._by_shortcut(update, contents) or (self._by_store(update, contents), None)
        # After a shortcut all workers have it, but for those that come up meanwhile: they may need what `watch` sees to.
        self.rollouts.set_weights(update, wait=wait and watch is None)
        if watch is not None:
            watch.start()
        return {
            "perf/sync_s": time.monotonic() - started,
            "perf/sync_mb": moved / 2**20,
            "perf/sync_fallbacks": float(self.fallbacks - fallbacks),
        }

    # --- the object store -----------------------------------------------------------------------------------------------

    def _by_store(self, update: WeightUpdate, contents: str) -> WeightUpdate:
        references, self.receipt = self.learner.put_weights(contents, len(update.layout.sizes))
        return self._stored(update, references, self.receipt.digests)

    def _stored(self, update: WeightUpdate, references: tuple, digests: tuple[int, ...]) -> WeightUpdate:
        carrier = Stored(tuple(references), digests, self.cfg.timeout_s)
        return replace(update, carrier=carrier, checksum=combined(digests, update.base.checksum if update.base else ""))

    def _stored_base(self) -> WeightUpdate:
        """The weights that adapters are added to, in the object store: put there once, because they never change."""
        if self._base is not None:
            return self._base
        return self._by_store(WeightUpdate(0, self._plan(BASE)[0]), BASE)

    def _plan(self, contents: str) -> tuple[Layout, dict[str, float]]:
        if contents not in self._plans:
            self._plans[contents] = self.learner.weights_plan(contents)
        return self._plans[contents]

    # --- shortcuts ------------------------------------------------------------------------------------------------------

    def _by_shortcut(self, update: WeightUpdate, contents: str) -> tuple[WeightUpdate, threading.Thread] | None:
        """Broadcast, or shared memory, if one serves; then (the update for the pool, the thread that is to see to its way into
        the store), else None. A failure is logged and counted, and the version goes through the store."""
        cannot = self.cfg.transport == AUTO and not self._learner[0].device
        if self.cfg.transport == STORE or cannot or not self.collective:
            return None
        way = "a look at the workers"
        try:
            facts = self._facts()
            way = self._way(facts)
            if way == STORE:
                return None
            self.receipt = self._send(update, contents, way, facts)
            workers = list(facts)
            buckets, done = self._keep(workers[0], update)
        except LearnerLost:
            raise
        except Exception as error:  # of any kind: the store has the last word, and a worker that fails there too is replaced
            self.fallbacks += 1
            self._group = ""
            why = first_line(error)
            log.warning("weights of version %d go through the object store: %s failed: %s", update.version, way, why)
            return None
        stored = self._stored(update, buckets, self.receipt.digests)
        about = (stored, workers, done, self._newest)
        return stored, threading.Thread(target=self._see_to, args=about, name="weights in the store", daemon=True)

    def _facts(self) -> dict[int, Facts]:
        return self.rollouts.each("weights_facts", timeout_s=DEADLINE_S, what="where the rollout workers are")

    def _way(self, facts: dict[int, Facts]) -> str:
        """How the workers of these facts are reached: the one asked for where it serves, the best one for `auto`."""
        learner, wanted = self._learner[0], self.cfg.transport
        here = [f.machine == learner.machine and f.device == learner.device for f in facts.values()]
        if not facts:
            return STORE
        if wanted == AUTO:
            on_gpus = all(f.device for f in facts.values())
            return SHARED if all(here) else BROADCAST if on_gpus else STORE
        if wanted == SHARED and not all(here):
            log.warning("rollout.transport=shared: a worker is on another machine or GPU than the learner; by the object store")
            return STORE
        return wanted

    def _send(self, update: WeightUpdate, contents: str, way: str, facts: dict[int, Facts]) -> Receipt:
        devices = [self._learner[0].device, *(f.device for f in facts.values())]
        one_each = "" not in devices and len(set(devices)) == len(devices)  # NCCL takes a GPU once
        on_gpu = one_each if way == BROADCAST else bool(devices[0])
        same = {f.group for f in facts.values()} == {self._group} and len(facts) == self._members
        if way == BROADCAST and not (self._group and same):
            self.groups += 1
            self._members = len(facts)
            self._group = f"weights {uuid.uuid4().hex[:8]}"
            log.info("a process group for weights: the learner and %d rollout workers", len(facts))
        order = Order(
            way=way,
            contents=contents,
            version=update.version,
            receivers=len(facts),
            device="cuda" if on_gpu else "cpu",
            group=self._group if way == BROADCAST else "",
            timeout_s=min(DEADLINE_S, self.cfg.timeout_s),
        )
        carrier = self.learner.prepare_weights(order)
        pending = self.learner.send_weights(contents)
        what = f"weights of version {update.version} by {way}"
        failed: Exception | None = None
        sent = replace(update, carrier=carrier)
        try:
            replies = self.rollouts.each("load_weights", sent, timeout_s=self.cfg.timeout_s, what=what)
        except Exception as error:  # the ranks are under way all the same: they are waited for first
            failed = error
        receipt = self.learner.sent_weights(pending)
        if receipt.error:
            raise ClusterError(receipt.error) from failed
        if failed is not None:
            raise failed
        wanted = (update.version, combined(receipt.digests, update.base.checksum if update.base else ""))
        odd = {worker: tuple(reply) for worker, reply in replies.items() if tuple(reply) != wanted}
        if odd or len(replies) < len(facts):
            raise ClusterError(f"{what}: of {len(facts)} workers {len(replies)} answered, of them {odd} not {wanted}")
        return receipt

    # --- for workers that start later -----------------------------------------------------------------------------------

    def _keep(self, worker: int, update: WeightUpdate) -> tuple[tuple, Any]:
        """(references to the buckets, one to the end) that a worker puts into the object store from its own copy, beside its
        work: whoever needs a bucket before it is there waits for it. They belong to the driver, so a worker that dies
        afterwards takes nothing along."""
        *buckets, done = self.rollouts.put_weights(worker, update.version, update.layout)
        return tuple(buckets), done

    def _see_to(self, stored: WeightUpdate, workers: list[int], done: Any, published: object) -> None:
        """If the worker dies, or is too late, before all is in the store, another one does it, until a newer version is out:
        until `published` is no longer the newest. Workers that were put to sleep hold it no more, and are not to be woken."""
        worker, what = workers[0], f"weights of version {stored.version}"
        for attempt in range(KEEP_ATTEMPTS * len(workers)):
            try:
                if attempt:
                    holders = [place for place, facts in self._facts().items() if facts.version == stored.version]
                    if not holders:
                        break
                    worker = holders[attempt % len(holders)]
                    buckets, done = self._keep(worker, stored)
                    stored = replace(stored, carrier=replace(stored.carrier, buckets=buckets))
                    with self._lock:
                        if self._newest is not published:
                            return
                        self.rollouts.set_weights(stored, wait=False)
                (good,) = wait([done], what=f"{what} from rollout worker {worker}", timeout_s=self.cfg.timeout_s)
                if good == len(stored.layout.sizes):
                    return
                raise ClusterError(f"it holds {good} of {len(stored.layout.sizes)} buckets")
            except Exception as error:  # of any kind: the next worker may do better
                if self._newest is not published:
                    return  # a newer version made it moot
                log.warning("%s from rollout worker %d did not get into the object store: %s", what, worker, first_line(error))
                time.sleep(min(LONGEST_PAUSE_S, float(attempt)))
        if self._newest is published:
            log.error("no rollout worker could keep version %d: one that starts before the next waits for it", stored.version)
