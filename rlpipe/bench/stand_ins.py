"""Rollout and learner workers that cost next to nothing, behind the calls of the real ones: what is left is the driver.

Nothing here imports torch before a worker starts, so that verifier processes stay small.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlpipe.data.source import PromptSource
from rlpipe.trajectory import COMMIT, EventLog, Prompt, Trajectories, Trajectory

BLOCK = 4  # tokens
WORD = "lorem "  # of the texts: about as many bytes a token as English has
VERDICT = f"{__name__}:verdict"


def verdict(prompt: Prompt, response: str) -> float:
    """1 for a response that begins with a 1."""
    return float(response.startswith("1"))


class Prompts(PromptSource):
    """As many as are asked for."""

    task, verifier, identity = "bench", VERDICT, "bench"

    def prompt(self, index: int) -> Prompt:
        return Prompt(uid=f"bench/train/0/{index}", task=self.task, text=f"{index}?", answer={"answer": 1})

    def test_prompts(self, count: int) -> list[Prompt]:
        return []


@dataclass(frozen=True, slots=True)
class Weights:
    """A weight update without weights."""

    version: int
    checksum: str = "none"


@dataclass(frozen=True, slots=True)
class Work:
    """What a fake rollout worker gives: samples of each prompt, their lengths in tokens, seconds that a unit takes."""

    samples: int
    prompt_len: int
    response_len: int
    seconds: float


def draw_group(work: Work) -> Trajectories:
    """A group of responses in blocks of 4, one token a step, as a sampler records them; all of one prompt."""
    rng, length = np.random.default_rng(0), work.response_len
    prompt = rng.integers(5, 30_000, work.prompt_len).astype(np.int32)
    blocks = (work.prompt_len + length - 1) // BLOCK - work.prompt_len // BLOCK + 1
    found = []
    for sample in range(work.samples):
        response = rng.integers(5, 30_000, length).astype(np.int32)
        logp = -rng.random(length).astype(np.float32)
        events = EventLog(
            step=np.arange(length, dtype=np.int32),
            position=np.arange(length, dtype=np.int32),
            token=response,
            kind=np.full(length, COMMIT, np.int8),
            logp=logp,
            logp_t1=logp,
            confidence=np.exp(logp),
            forced=np.zeros(length, bool),
        )
        found.append(
            Trajectory(
                uid="",
                sample=sample,
                seed=0,
                prompt_ids=prompt,
                response_ids=response,
                valid_len=length,
                block_size=BLOCK,
                versions=np.zeros(blocks, np.int32),
                stop="length",
                events=events,
                decoder={},
            )
        )
    return Trajectories.of(found)


class RolloutHost:
    """Many fake rollout workers in one process. worker: which of them is meant; otherwise the calls of `RolloutWorker`."""

    def __init__(self, work: Work):
        from rlpipe.rollout.worker import RolloutPart
        from rlpipe.sampling.engine import EngineCounters

        self.work, self.part, self.counters = work, RolloutPart, EngineCounters
        self.group, self.version = draw_group(work), Counter()
        text = WORD * (work.response_len * 4 // len(WORD))  # four bytes a token
        self.texts = tuple(f"{sample % 2} {sample} {text}" for sample in range(work.samples))

    def pid(self, worker: int) -> int:
        return os.getpid()

    def usage(self, worker: int) -> dict[str, float]:
        return {}

    def load_weights(self, worker: int, update: Weights) -> tuple[int, str]:
        self.version[worker] = update.version
        return update.version, update.checksum

    def abort(self, worker: int, unit: str) -> None:
        """Units of a fake worker run to their end, as those of a worker that does not hear."""

    def generate(self, worker: int, request: Any) -> Iterator[Any]:
        """A `RolloutPart` for each prompt of the request."""
        columns, length = self.group.columns, self.work.response_len
        for place, prompt in enumerate(request.prompts):
            if self.work.seconds:
                time.sleep(self.work.seconds / len(request.prompts))
            own = columns | {"versions": np.full_like(columns["versions"], self.version[worker])}
            group = Trajectories(own, (prompt.uid,) * request.samples, self.group.decoder)
            work = self.counters(tokens=request.samples * length, responses=request.samples)
            yield self.part(place, group, self.texts, work)


class RankHost:
    """A fake learner rank: takes its shard of a step, and answers at once as `LearnerWorker.train` does."""

    def usage(self) -> dict[str, float]:
        return {}

    def train(self, shard: Any) -> dict[str, Any]:
        kept = list(shard.samples)
        logp = np.concatenate([sample.rollout_logp for sample in kept] or [np.zeros(0, np.float32)])
        sums = {"loss": 0.0, "policy_loss": 0.0, "kl_loss": 0.0, "units": float(len(logp)), "tokens": float(len(logp))}
        return {
            "updates": [{"sums": dict(sums), "grad_norm": 1.0, "lr": 0.0} for _ in shard.updates],
            "learner": logp,
            "rollout": logp,
            "exact": np.concatenate([sample.on_policy for sample in kept] or [np.zeros(0, bool)]),
            "lag": np.concatenate([sample.lag for sample in kept] or [np.zeros(0, np.int32)]),
        }


@dataclass(frozen=True, slots=True)
class Handle:
    """In the place of an actor's handle: the worker-th of a host's workers."""

    host: Any
    worker: int

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self.host, name), self.worker)


@dataclass(frozen=True, slots=True)
class _Method:
    method: Any
    worker: int

    def options(self, **ignored: Any) -> _Method:
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self.method.remote(self.worker, *args, **kwargs)


def host_rollouts(work: Work, workers: int, per_process: int) -> tuple[list[Any], Callable[[int], Handle]]:
    """(the processes, what makes the handle of a worker). A host has a thread for each of its workers and some to spare."""
    import ray

    actor = ray.remote(RolloutHost).options(num_cpus=0, max_concurrency=per_process + 8)
    hosts = [actor.remote(work) for _ in range(-(-workers // per_process))]
    places = dict(enumerate(itertools.islice(itertools.cycle(hosts), workers)))
    return hosts, lambda index: Handle(places[index], index)
