"""From scored groups to the samples of a step: advantages, rows, weights. Pure; the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlpipe.learner.samples import Sample
from rlpipe.objectives.objective import Objective
from rlpipe.objectives.planner import plan_replay
from rlpipe.objectives.rows import Rows
from rlpipe.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class StepPlan:
    """samples: all that is scored · updates: indices of each optimizer update · gauge: indices scored for parity only."""

    samples: list[Sample]
    updates: list[list[int]]
    gauge: list[int]

    @property
    def rows(self) -> int:
        return sum(len(self.samples[i].scored) for update in self.updates for i in update)

    @property
    def packed_tokens(self) -> int:
        return sum(self.samples[i].packed_tokens() for update in self.updates for i in update)


def plan_step(
    trajectories: Sequence[Trajectory],
    advantages: np.ndarray,
    objective: Objective,
    *,
    updates: int,
    gauge_trajectories: int,
    rng: np.random.Generator,
) -> StepPlan:
    """trajectories and advantages float32[N] in one order. The trajectories are dealt at random to `updates` optimizer updates
    (fewer if there are not enough), each with its own reducer weights. When the objective's rows are not the states that the
    sampler saw, the first `gauge_trajectories` are also replayed exactly, for the parity gauge alone."""
    order = rng.permutation(len(trajectories))
    samples: list[Sample] = []
    plan: list[list[int]] = []
    for part in np.array_split(order, min(updates, len(order))):
        chosen = [trajectories[i] for i in part]
        rows = [objective.plan(trajectory, rng) for trajectory in chosen]
        weights = objective.weights(rows, [trajectory.response_len for trajectory in chosen])
        first = len(samples)
        for i, trajectory, row, policy, kl in zip(part, chosen, rows, *weights, strict=True):
            advantage = np.full(row.num_scored, advantages[i], np.float32)
            samples += make_samples(trajectory, row, advantage, policy, kl, replays=objective.replays_rollout)
        plan.append(list(range(first, len(samples))))
    first = len(samples)
    if not objective.replays_rollout:
        for trajectory in trajectories[:gauge_trajectories]:
            if trajectory.is_monotone():
                row = plan_replay(trajectory)
                nothing = np.zeros(row.num_scored, np.float32)
                samples += make_samples(trajectory, row, nothing, nothing, nothing, replays=True)
    return StepPlan(samples, plan, list(range(first, len(samples))))


def make_samples(
    trajectory: Trajectory,
    rows: Rows,
    advantage: np.ndarray,
    policy_weight: np.ndarray,
    kl_weight: np.ndarray,
    *,
    replays: bool,
) -> list[Sample]:
    """One sample for a block trajectory, one a row for a full-attention one. advantage and weights float32[M], row-major.

    replays: the rows show the learner exactly the states the sampler saw, so log-probabilities can be compared.
    """
    if not len(rows):
        return []
    if replays:
        rollout = np.broadcast_to(trajectory.at_commit("logp"), rows.scored.shape)[rows.scored]
    else:
        rollout = np.full(rows.num_scored, np.nan, np.float32)
    ends = rows.scored.sum(1).cumsum()
    parts = [slice(0, len(rows.scored))] if trajectory.block_size else [slice(r, r + 1) for r in range(len(rows.scored))]
    samples = []
    for part in parts:
        flat = slice(int(ends[part.start - 1]) if part.start else 0, int(ends[part.stop - 1]))
        if flat.stop == flat.start:
            continue
        samples.append(
            Sample(
                prompt_ids=trajectory.prompt_ids,
                response_ids=trajectory.response_ids,
                block_size=trajectory.block_size,
                masked=rows.masked[part],
                scored=rows.scored[part],
                targets=np.zeros((0, 0), np.int32) if rows.targets is None else rows.targets[part],
                advantage=advantage[flat],
                policy_weight=policy_weight[flat],
                kl_weight=kl_weight[flat],
                rollout_logp=rollout[flat],
                exact=trajectory.exact,
            )
        )
    return samples
