"""The pool of rollout workers: fixed units of work out, whole groups back, weights kept current through restarts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlpipe.actor_pool import ActorPool, Call, Failure
from rlpipe.cluster import Placement, wait
from rlpipe.config import DecoderConfig, RunConfig
from rlpipe.errors import RolloutFailed, WeightMismatch
from rlpipe.models.weights import Manifest
from rlpipe.rollout.worker import RolloutRequest, RolloutWorker
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Prompt, Trajectory


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """A version of the policy in the object store. buckets: Ray references to uint8 arrays."""

    manifest: Manifest
    buckets: tuple


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


class RolloutPool:
    """Units of work are cut by the driver, not by the workers, so results do not depend on how many workers there are."""

    def __init__(self, cfg: RunConfig, model_folder: str, placement: Placement):
        import ray

        self.cfg = cfg.rollout
        self.seed = cfg.seed
        self.current: WeightUpdate | None = None
        actor = ray.remote(RolloutWorker)

        def make(index: int):
            options = placement.options("rollout", index)
            return actor.options(**options).remote(index, model_folder, cfg.model, self.cfg.threads, self.cfg.slots)

        self.pool = ActorPool(
            make,
            self.cfg.workers,
            name="rollout",
            retries=self.cfg.retries,
            prepare=self._push,
            start_timeout_s=cfg.cluster.start_timeout_s,
        )

    def update_weights(self, update: WeightUpdate) -> None:
        """Every worker takes the update. Raises WeightMismatch unless all end with its version and checksum."""
        self.current = update
        wanted = (update.manifest.version, update.manifest.checksum)
        replies = self.pool.broadcast(
            "load_weights",
            update.manifest,
            *update.buckets,
            timeout_s=self.cfg.timeout_s,
            what=f"weights of version {wanted[0]} on the rollout workers",
        )
        for index, reply in enumerate(replies):
            if tuple(reply) != wanted:
                raise WeightMismatch(f"rollout worker {index} answered {reply} to weights {wanted}")

    def _push(self, worker) -> None:
        """A worker that was restarted holds the initial weights: give it the current ones before any work."""
        if self.current is not None:
            reference = worker.load_weights.remote(self.current.manifest, *self.current.buckets)
            wait([reference], what="weights on a restarted rollout worker", timeout_s=self.cfg.timeout_s)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        decoder: DecoderConfig,
        *,
        what: str,
        seed: int | None = None,
        predictions: int = 0,
    ) -> tuple[list[Group], EngineCounters]:
        """Groups in the order of the prompts, and the work they took (seconds: summed over units); see `stream`."""
        found: dict[int, Group] = {}
        total = EngineCounters()
        for index, group, counters in self.stream(prompts, samples, decoder, what=what, seed=seed, predictions=predictions):
            found[index] = group
            total = total + counters
        return [found[index] for index in range(len(prompts))], total

    def stream(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        decoder: DecoderConfig,
        *,
        what: str,
        seed: int | None = None,
        predictions: int = 0,
    ) -> Iterator[tuple[int, Group, EngineCounters]]:
        """(index of the prompt, its group, work since the group before) as groups are done, each exactly once.
        predictions: the full prediction is recorded every so many denoising steps, 0: never. A prompt with a block size of its
        own is decoded in blocks of that size, unless the decoder's is another than the recipe's: whoever votes over block
        sizes means them.

        Raises RolloutFailed when a unit fails more often than its retries allow: an unsampled response is never an empty one.
        """
        per_unit = max(1, self.cfg.batch_size // samples)
        own = decoder.block_size == self.cfg.decoder.block_size
        units = units_of_work([prompt.block_size if own else 0 for prompt in prompts], per_unit)
        requests = [
            RolloutRequest(
                prompts=tuple(prompts[index] for index in indices),
                samples=samples,
                decoder=dataclasses.replace(decoder, block_size=size) if size else decoder,
                version=self.current.manifest.version,
                seed=self.seed if seed is None else seed,
                predictions=predictions,
            )
            for size, indices in units
        ]
        calls = [
            Call("generate", (request,), label=f"unit {i + 1}/{len(requests)} ({request.prompts[0].uid} …)")
            for i, request in enumerate(requests)
        ]
        seen: set[int] = set()
        for unit, part in self.pool.stream(calls, timeout_s=self.cfg.timeout_s, what=what):
            if isinstance(part, Failure):
                raise RolloutFailed(f"{what}: {part}") from part.cause
            index = -1 if part is None else units[unit][1][part.place]
            if part is None or index in seen:  # the end of a unit; or a unit that was tried again, with the same samples
                continue
            seen.add(index)
            steps = {"step_texts": list(part.step_texts), "step_index": list(part.step_index)}
            yield index, Group(prompts[index], list(part.trajectories), list(part.texts), **steps), part.counters

    def token_texts(self, responses: Sequence[np.ndarray]) -> list[list[str]]:
        """Tokens one by one, for display; decoded by whichever worker is free."""
        result = self.pool.run(
            [Call("token_texts", (list(responses),), label="display")], timeout_s=self.cfg.timeout_s, what="token texts"
        )[0]
        if isinstance(result, Failure):
            raise RolloutFailed(f"token texts: {result}") from result.cause
        return result

    def close(self) -> None:
        self.pool.close()


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
