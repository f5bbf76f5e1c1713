"""The pool of rollout workers: units of work out, whole groups back, weights kept current through restarts."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlpipe.actor_pool import ActorPool, Call, Failure, Ticket, next_of
from rlpipe.actor_slot import Preparation
from rlpipe.cluster import Placement
from rlpipe.config import DecoderConfig, RunConfig
from rlpipe.errors import RolloutFailed, WeightMismatch, WorkerLost
from rlpipe.models.weights import Layout
from rlpipe.rollout.worker import RolloutPart, RolloutRequest, RolloutWorker
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Prompt, Trajectory
from rlpipe.transport.update import WeightUpdate

log = logging.getLogger("rlpipe")

CONTROL = "control"  # the concurrency group of calls that do not wait for a unit
CONTROL_CALLS = 4  # of these at a time
DISPLAY_S = 30.0  # for a worker to spell out some tokens


@dataclass(slots=True)
class Group:
    """All samples of one prompt. rewards and parts (one dict a sample) are filled in by the verifiers. step_texts, step_index:
    texts of the predictions of each sample, as in `RolloutPart`; empty without."""

    prompt: Prompt
    trajectories: list[Trajectory]
    texts: list[str]
    rewards: np.ndarray | None = None
    parts: list[dict[str, float]] = field(default_factory=list)
    step_texts: list[tuple[str, ...]] = field(default_factory=list)
    step_index: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, prompt: Prompt, part: RolloutPart) -> Group:
        steps = {"step_texts": list(part.step_texts), "step_index": list(part.step_index)}
        return cls(prompt, list(part.trajectories), list(part.texts), **steps)

    @property
    def version(self) -> int:
        """The oldest weights that any of its tokens was sampled with."""
        return min(trajectory.version for trajectory in self.trajectories)


TakeGroup = Callable[[int, Group | RolloutFailed, EngineCounters], None]


class RolloutPool:
    """Units of work are cut by the driver, not by the workers, so results do not depend on how many workers there are.

    at_once: units under way take new weights between two blocks; else they end with the weights that they began with.
    """

    def __init__(
        self, cfg: RunConfig, model_folder: str, placement: Placement, spans: Callable | None = None, at_once: bool = False
    ):
        import ray

        self.cfg, self.seed, self.at_once = cfg.rollout, cfg.seed, at_once
        self.version = -1
        self._units = itertools.count(1)
        actor = ray.remote(concurrency_groups={CONTROL: CONTROL_CALLS})(RolloutWorker)

        def make(index: int):
            options = placement.options("rollout", index)
            own = (cfg.model, self.cfg.threads, self.cfg.slots, cfg.guide)
            return actor.options(**options).remote(index, model_folder, *own)

        self.pool = ActorPool(
            make,
            self.cfg.workers,
            name="rollout",
            retries=self.cfg.retries,
            minimum=self.cfg.min_workers,
            has_place=lambda index: placement.ready("rollout", index),
            group=CONTROL,
            start_timeout_s=cfg.cluster.start_timeout_s,
            spans=spans,
        )

    def set_weights(self, update: WeightUpdate, *, wait: bool) -> None:
        """No worker samples another unit before it has the update, those that start later included. wait: return when all that
        are up have it.

        A worker that ends with another version or checksum is replaced, and so is one that does not answer in time.
        """

        def check(reply: tuple[int, str]) -> None:
            wanted = (update.version, update.checksum or reply[1])
            if tuple(reply) != wanted:
                raise WeightMismatch(f"a rollout worker answered {tuple(reply)} to weights {wanted}")

        self.pool.prepare(
            Preparation(
                "load_weights",
                (update,),
                label=f"weights of version {update.version}",
                timeout_s=self.cfg.timeout_s,
                check=check,
                at_once=self.at_once,
            )
        )
        self.version = update.version  # not before: a unit asks for no weights that its worker need not have
        if wait:
            self._wait_prepared()

    def sleep(self) -> None:
        """All workers let go of weights and cache; weights wake them, and units wait for that. A worker that starts meanwhile
        does so first."""
        label = "rollout workers to sleep"
        self.pool.prepare(Preparation("sleep", (), label=label, timeout_s=self.cfg.timeout_s, rest=True))
        self._wait_prepared()

    def _wait_prepared(self) -> None:
        """A worker that hangs is replaced after `timeout_s`: the wait outlasts that, the next one's start and its own turn."""
        self.pool.wait_prepared(2 * self.cfg.timeout_s + self.pool.start_timeout_s)

    def put_weights(self, worker: int, version: int, layout: Layout) -> list:
        """References to the buckets that a worker puts into the object store from its own copy, and to their number."""
        return self.pool.ask(worker, "put_weights", version, layout, replies=len(layout.sizes) + 1)

    def each(self, method: str, *args: Any, timeout_s: float, what: str) -> dict[int, Any]:
        """{worker: reply} of all that are up, beside the units they work on."""
        return self.pool.each(method, *args, timeout_s=timeout_s, what=what)

    def submit(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        decoder: DecoderConfig,
        take: TakeGroup,
        *,
        what: str,
        seed: int | None = None,
        predictions: int = 0,
        urgency: int = 1,
    ) -> list[tuple[list[int], Ticket]]:
        """Set off the sampling of groups. take(index of the prompt, its group, work since the group before) is called once a
        prompt, as groups are done, on a thread of the pool's; with RolloutFailed for those of a unit that failed more often
        than its retries allow: an unsampled response is never an empty one. Returns (indices of prompts, ticket) of each unit.

        predictions: the full prediction is recorded every so many denoising steps, 0: never. A prompt with a block size of its
        own is decoded in blocks of that size, unless the decoder's is another than the recipe's: whoever votes over block sizes
        means them.
        """
        per_unit = self.prompts_per_unit(samples)
        own = decoder.block_size == self.cfg.decoder.block_size
        units = units_of_work([prompt.block_size if own else 0 for prompt in prompts], per_unit)
        tickets = []
        for number, (size, indices) in enumerate(units, 1):
            label = f"unit {number}/{len(units)} ({prompts[indices[0]].uid} …)"
            request = RolloutRequest(
                unit=f"{next(self._units)}: {label}",
                prompts=tuple(prompts[index] for index in indices),
                samples=samples,
                decoder=dataclasses.replace(decoder, block_size=size) if size else decoder,
                version=self.version,
                seed=self.seed if seed is None else seed,
                predictions=predictions,
            )
            call = Call("generate", (request,), label=request.unit)
            unit = _Unit([prompts[index] for index in indices], indices, take, what)
            tickets.append(
                (indices, self.pool.submit(call, unit.take, timeout_s=self.cfg.timeout_s, what=what, urgency=urgency))
            )
        return tickets

    def prompts_per_unit(self, samples: int) -> int:
        return max(1, self.cfg.batch_size // samples)

    @property
    def units_waiting(self) -> int:
        """Units that no worker has taken up yet."""
        return len(self.pool.waiting)

    @property
    def hungry(self) -> bool:
        """A worker has nothing to do, and no unit waits for it."""
        return self.pool.idle > self.units_waiting

    def cancel(self, ticket: Ticket) -> None:
        """The groups of a unit are no longer wanted; its worker drops what it has."""
        self.pool.cancel(ticket, abort="abort")

    def generate(
        self, prompts: Sequence[Prompt], samples: int, decoder: DecoderConfig, **settings: Any
    ) -> tuple[list[Group], EngineCounters]:
        """Groups in the order of the prompts, and the work they took (seconds: summed over units); see `submit`."""
        found: dict[int, Group] = {}
        total = EngineCounters()
        for index, group, counters in self.stream(prompts, samples, decoder, **settings):
            found[index] = group
            total = total + counters
        return [found[index] for index in range(len(prompts))], total

    def stream(
        self, prompts: Sequence[Prompt], samples: int, decoder: DecoderConfig, *, what: str, **settings: Any
    ) -> Iterator[tuple[int, Group, EngineCounters]]:
        """(index of the prompt, its group, work since the group before) as groups are done, each exactly once, before whatever
        else the workers have to do; see `submit`, whose failures are raised here."""
        arrived: queue.SimpleQueue = queue.SimpleQueue()
        tickets = self.submit(
            prompts, samples, decoder, lambda *group: arrived.put(group), what=what, **{"urgency": 0} | settings
        )
        try:
            for done in range(len(prompts)):
                index, group, counters = next_of(arrived, what, done, len(prompts))
                if isinstance(group, RolloutFailed):
                    raise group from group.__cause__
                yield index, group, counters
        finally:
            for _, ticket in tickets:
                self.cancel(ticket)

    def token_texts(self, responses: Sequence[np.ndarray]) -> list[list[str]]:
        """Tokens one by one, for display: by a worker beside its unit, whose end may be minutes away. If none answers it is a
        unit of its own, which waits for workers. Raises RolloutFailed."""
        try:
            return self.pool.any("token_texts", list(responses), timeout_s=DISPLAY_S, what="token texts")
        except WorkerLost:
            log.info("no rollout worker is up to spell out tokens; the step's samples wait for one")
        result = self.pool.run(
            [Call("token_texts", (list(responses),), label="display")], timeout_s=self.cfg.timeout_s, what="token texts"
        )[0]
        if isinstance(result, Failure):
            raise RolloutFailed(f"token texts: {result}") from result.cause
        return result

    def close(self) -> None:
        self.pool.close()


class _Unit:
    """Turns the parts of a unit into groups, each once: a unit that is tried again gives all its parts again, and a group is
    taken whole from one attempt, never made of two."""

    def __init__(self, prompts: Sequence[Prompt], indices: Sequence[int], take: TakeGroup, what: str):
        self.prompts, self.indices, self.give, self.what = prompts, indices, take, what
        self.open = set(range(len(indices)))

    def take(self, part: RolloutPart | Failure | None, more: bool) -> None:
        if isinstance(part, Failure):
            for place in sorted(self.open):
                failure = RolloutFailed(f"{self.what}: {part}")
                failure.__cause__ = part.cause
                self.give(self.indices[place], failure, EngineCounters())
            self.open.clear()
        elif part is not None and part.place in self.open:
            self.open.discard(part.place)
            self.give(self.indices[part.place], Group.of(self.prompts[part.place], part), part.counters)


def units_of_work(block_sizes: Sequence[int], per_unit: int) -> list[tuple[int, list[int]]]:
    """(block size, indices of up to per_unit prompts of that size, in order); units in order of their first prompt. All samples
    of a unit share one decoder, so prompts of different block sizes cannot."""
    units: list[tuple[int, list[int]]] = []
    open_unit: dict[int, list[int]] = {}
    for index, size in enumerate(block_sizes):
        if len(open_unit.get(size, ())) in (0, per_unit):
            open_unit[size] = []
            units.append((size, open_unit[size]))
        open_unit[size].append(index)
    return units
