"""From scored groups to the samples of a step: advantages, rows, units, weights. Pure; the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlpipe.config import AlgoConfig
from rlpipe.learner.micro_batches import Sizes
from rlpipe.learner.samples import Sample
from rlpipe.objectives.objective import Objective
from rlpipe.objectives.planner import plan_replay, response_blocks
from rlpipe.objectives.rows import Rows
from rlpipe.objectives.units import Units, join
from rlpipe.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class StepPlan:
    """samples: all that is scored · owner: the trajectory each belongs to · updates: indices of each optimizer update · gauge:
    indices scored for parity only."""

    samples: list[Sample]
    owner: list[int]
    updates: list[list[int]]
    gauge: list[int]

    @property
    def rows(self) -> int:
        return sum(len(self.samples[i].scored) for update in self.updates for i in update)

    @property
    def packed_tokens(self) -> int:
        """Tokens of the updates if each fitted one micro-batch."""
        sizes = Sizes.of(self.samples)
        return sum(sizes.tokens(update) for update in self.updates)


def plan_step(
    trajectories: Sequence[Trajectory],
    advantages: np.ndarray,
    objective: Objective,
    *,
    updates: int,
    gauge_trajectories: int,
    rng: np.random.Generator,
    draws: int = 1,
    version: int | None = None,
) -> StepPlan:
    """trajectories and advantages float32[N] in one order. Whole groups are dealt at random to `updates` optimizer updates
    (single responses where there are fewer groups than updates), each with its own reducer weights; that is done `draws` times,
    with rows planned anew. When the objective's rows are not the states that the sampler saw, `gauge_trajectories` of them are
    also replayed exactly, for the parity gauge alone: the first ones, those that the policy drew a part of before all others.
    version: of the weights that open the step, see `token_lags`."""
    group = np.unique([trajectory.uid for trajectory in trajectories], return_inverse=True)[1]
    samples: list[Sample] = []
    owner: list[int] = []
    plan: list[list[int]] = []

    def add(i: int, row: Rows, units: Units, policy: np.ndarray, kl: np.ndarray, replays: bool) -> None:
        drawn = {"replays": replays, "version": version}
        made = make_samples(trajectories[i], row, units, policy, kl, advantages[i], int(group[i]), **drawn)
        samples.extend(made)
        owner.extend([i] * len(made))

    for _ in range(draws):
        rows = objective.plan_all(trajectories, rng)
        for part in deal(group, updates, rng):
            first = len(samples)
            units = [objective.units(rows[i], trajectories[i]) for i in part]
            weights = objective.weights(units, [trajectories[i].response_len for i in part])
            for i, unit, policy, kl in zip(part, units, *weights, strict=True):
                add(i, rows[i], unit, policy, kl, objective.replays_rollout)
            plan.append(list(range(first, len(samples))))
    first = len(samples)
    if not objective.replays_rollout:
        comparable = [t.exact and (version is None or version in t.versions) for t in trajectories]
        for i in sorted(range(len(trajectories)), key=lambda i: not comparable[i])[:gauge_trajectories]:
            trajectory = trajectories[i]
            if trajectory.is_monotone():
                row = plan_replay(trajectory)
                nothing = np.zeros(row.num_scored, np.float32)
                add(i, row, join(row, "token", np.zeros(trajectory.response_len, np.int64)), nothing, nothing, True)
    return StepPlan(samples, owner, [update for update in plan if update], list(range(first, len(samples))))


def draws_and_passes(algo: AlgoConfig) -> tuple[int, int]:
    """(how often a step's rows are drawn, how often the learner goes through them): algo.epochs of one or of the other."""
    return (algo.epochs, 1) if algo.redraw else (1, algo.epochs)


def deal(group: np.ndarray, updates: int, rng: np.random.Generator) -> list[np.ndarray]:
    """group int[N] of each response → the responses of each update, in the order of their groups."""
    count = int(group.max()) + 1
    if count < updates:
        return np.array_split(rng.permutation(len(group)), min(updates, len(group)))
    parts = np.array_split(rng.permutation(count), updates)
    return [np.concatenate([np.flatnonzero(group == g) for g in part]) for part in parts]


def token_lags(trajectory: Trajectory, version: int | None) -> np.ndarray:
    """int32[L]: how many weight versions before `version` each response token was drawn: its block's under block attention, the
    response's oldest under full attention, where no more is known. None: all weights count as the same."""
    if version is None:
        return np.zeros(trajectory.response_len, np.int32)
    block = response_blocks(trajectory)
    return (version - trajectory.versions[block - block[:1]]).astype(np.int32)


def make_samples(
    trajectory: Trajectory,
    rows: Rows,
    units: Units,
    policy_weight: np.ndarray,
    kl_weight: np.ndarray,
    advantage: float,
    group: int,
    *,
    replays: bool,
    version: int | None = None,
) -> list[Sample]:
    """One sample for a block trajectory; under full attention one a row, or one in all where units span rows. Weights
    float32[U]; advantage: of the response, unless the units have their own.

    replays: the rows show the learner exactly the states the sampler saw, so log-probabilities can be compared · version: of
    the weights that open the step, see `token_lags`.
    """
    place = np.nonzero(rows.scored)[1]
    lag = token_lags(trajectory, version)[place]
    credit = np.full(len(units), advantage, np.float32) if units.credit is None else units.credit
    rollout = np.full(rows.num_scored, np.nan, np.float32)
    if replays:
        rollout = trajectory.at_commit("logp")[place]
    starts = np.concatenate([[0], rows.scored.sum(1).cumsum()])  # entries are row-major, so a part's lie together
    samples, alone = [], units.plain
    for part in _parts(rows, units, bool(trajectory.block_size)):
        entries = slice(starts[part.start], starts[part.stop])
        if entries.start == entries.stop:
            continue
        chosen, unit, plain = entries, None, alone
        if not alone:
            chosen, unit = np.unique(units.entry[entries], return_inverse=True)
            plain = len(chosen) == len(unit) and bool((units.coefficient[entries] == 1).all())
        samples.append(
            Sample(
                prompt_ids=trajectory.prompt_ids,
                response_ids=_shown(trajectory, rows, part),
                block_size=trajectory.block_size,
                group=group,
                masked=rows.masked[part],
                scored=rows.scored[part],
                targets=np.zeros((0, 0), np.int32) if rows.targets is None else rows.targets[part],
                advantage=credit[chosen],
                policy_weight=policy_weight[chosen],
                kl_weight=kl_weight[chosen],
                rollout_logp=rollout[entries],
                lag=lag[entries],
                unit=np.zeros(0, np.int32) if plain else unit.astype(np.int32),
                coefficient=np.zeros(0, np.float32) if plain else units.coefficient[entries],
                returns=np.zeros(0, np.float32),
                exact=trajectory.exact,
            )
        )
    return samples


def _shown(trajectory: Trajectory, rows: Rows, part: slice) -> np.ndarray:
    """int32[L]: what the sample's rows show where they mask nothing. A row with targets of its own (a full prediction) was
    sampled behind the tokens that it still holds, which a decoder may have taken back since."""
    if rows.targets is None or trajectory.block_size or part.stop - part.start > 1:
        return trajectory.response_ids
    return rows.targets[part.start].astype(np.int32)


def _parts(rows: Rows, units: Units, together: bool) -> list[slice]:
    """The rows of each sample."""
    row = np.nonzero(rows.scored)[0]
    spans = len(row) and (row != row[np.unique(units.entry, return_index=True)[1]][units.entry]).any()
    if together or spans:
        return [slice(0, len(rows))]
    return [slice(r, r + 1) for r in range(len(rows))]
