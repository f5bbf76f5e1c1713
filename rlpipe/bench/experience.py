"""Made-up experience for the learner: random responses in random commit orders, as a sampler would have recorded them."""

from __future__ import annotations

import numpy as np

from rlpipe.bench.settings import LearnerSettings
from rlpipe.config import AlgoConfig
from rlpipe.learner.step import StepPlan, plan_step
from rlpipe.models.policy import DiffusionLM
from rlpipe.objectives.objective import Objective, build_objective
from rlpipe.trajectory import COMMIT, EventLog, Trajectory


def draw_trajectories(settings: LearnerSettings, model: DiffusionLM) -> list[Trajectory]:
    """`groups` × `samples` responses of `response_len` tokens; blocks one after the other, inside them a random order."""
    rng, spec = np.random.default_rng(settings.seed), model.spec
    possible = np.setdiff1d(np.arange(model.lm.config.vocab_size), [*spec.forbidden_ids, *spec.eos_token_ids])
    found = []
    for group in range(settings.groups):
        prompt = rng.choice(possible, settings.prompt_len).astype(np.int32)
        for sample in range(settings.samples):
            response = rng.choice(possible, settings.response_len).astype(np.int32)
            uid = f"bench/{group}"
            found.append(_trajectory(uid, sample, prompt, response, spec.block_size, settings.tokens_per_step, rng))
    return found


def _trajectory(uid: str, sample: int, prompt, response, size: int, per_step: int, rng) -> Trajectory:
    block = np.arange(len(prompt), len(prompt) + len(response)) // size
    block -= block[0]
    position = np.lexsort((rng.random(len(response)), block))  # blocks in order, a random order inside each
    _, first = np.unique(block, return_index=True)
    inside = np.arange(len(response)) - first[block]  # blocks are contiguous, so this is the rank inside the block
    steps_before = np.concatenate([[0], np.cumsum(-(-np.bincount(block) // per_step))])[:-1]
    count = len(response)
    log = EventLog(
        step=(steps_before[block] + inside // per_step).astype(np.int32),
        position=position.astype(np.int32),
        token=response[position],
        kind=np.full(count, COMMIT, np.int8),
        logp=np.full(count, np.nan, np.float32),
        logp_t1=np.full(count, np.nan, np.float32),
        confidence=np.full(count, np.nan, np.float32),
        forced=np.zeros(count, bool),
    )
    return Trajectory(
        uid=uid,
        sample=sample,
        seed=0,
        prompt_ids=prompt,
        response_ids=response,
        valid_len=count,
        block_size=size,
        versions=np.zeros(int(block[-1]) + 1, np.int32),
        stop="length",
        events=log,
        decoder={},
    )


def draw_step(settings: LearnerSettings, model: DiffusionLM) -> tuple[StepPlan, Objective]:
    """One TraceRL update over all of it, with random advantages."""
    trajectories = draw_trajectories(settings, model)
    objective = build_objective(AlgoConfig(shrink=settings.shrink, normalizer="row_mean"), settings.response_len)
    rng = np.random.default_rng(settings.seed + 1)
    advantages = rng.normal(size=len(trajectories)).astype(np.float32)
    return plan_step(trajectories, advantages, objective, updates=1, gauge_trajectories=0, rng=rng), objective
