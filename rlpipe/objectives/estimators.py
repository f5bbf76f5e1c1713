"""Row planners that score a part of a rollout, or states that it never saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlpipe.objectives.planner import response_blocks, rows_by_rank, slice_ranks
from rlpipe.objectives.rows import Rows
from rlpipe.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Segments:
    """The steps of a rollout cut into `count` even segments, each scored from the state before it (d2-StepMerge, arXiv
    2509.21474). For block models every block is cut for itself. The reference also masks prompt tokens with probability .15;
    our prompts stay clean."""

    count: int = 16

    @property
    def replays_rollout(self) -> bool:
        return False

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        steps, block = trajectory.step_map(), response_blocks(trajectory)
        rank = np.full(trajectory.response_len, trajectory.response_len, np.int64)
        rank[trajectory.preset() & (steps == 0)] = -1
        drawn = np.flatnonzero(steps)
        dense = slice_ranks(steps[drawn], block[drawn], 1)
        total = np.zeros(int(block.max()) + 1, np.int64)
        np.maximum.at(total, block[drawn], dense + 1)
        rank[drawn] = dense * self.count // np.maximum(total[block[drawn]], self.count)
        return rows_by_rank(trajectory, rank)


@dataclass(frozen=True, slots=True)
class SampledSteps:
    """`count` of a rollout's steps, drawn evenly with random offsets, each weighed by 1 / (steps · probability · count): their
    sum estimates the mean over all steps. Steps that score nothing that counts are left out. Source: AGRPO (arXiv 2510.04019),
    in its uniform form, since entropies are not recorded."""

    count: int = 24

    @property
    def replays_rollout(self) -> bool:
        return True

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        steps, counted = trajectory.step_map(), trajectory.loss_mask()
        rank = np.full(trajectory.response_len, trajectory.response_len, np.int64)
        rank[trajectory.preset() & (steps == 0)] = -1
        drawn = np.flatnonzero(steps)
        rank[drawn] = slice_ranks(steps[drawn], np.zeros(len(drawn), np.int64), 1)
        rows = rows_by_rank(trajectory, rank)
        if not counted.any():
            return rows
        offsets = (rng.permutation(self.count) + rng.random(self.count)) / self.count
        chosen, weight = draw_steps(np.ones(len(rows)), offsets)
        keep, place = np.unique(chosen, return_inverse=True)
        total = np.bincount(place, weights=weight).astype(np.float32) / self.count
        return Rows(masked=rows.masked[keep], scored=rows.scored[keep], step=rows.step[keep], weight=total)


def draw_steps(importance: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """importance float[S] of the steps, offsets float[K] in [0, 1) → (step of each draw int64[K], its weight float[K]).

    A step's probability is its share of the importance; its weight 1 / (S · probability) makes the draws unbiased.
    """
    share = importance / importance.sum()
    chosen = np.minimum(np.searchsorted(share.cumsum(), offsets, side="right"), len(share) - 1)
    return chosen, 1.0 / (len(share) * share[chosen])


@dataclass(frozen=True, slots=True)
class LeftToRight:
    """Every token from the prefix before it, whatever order it was sampled in (JustGRPO, arXiv 2601.15165); block models:
    inside its block. fraction: of the rows, drawn at random and weighed by 1 / fraction so that the sum keeps its mean."""

    fraction: float = 1.0

    @property
    def replays_rollout(self) -> bool:
        return False

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        steps = trajectory.step_map()
        place = trajectory.prompt_len + np.arange(trajectory.response_len)
        rank = place % trajectory.block_size if trajectory.block_size else place - trajectory.prompt_len
        never = max(trajectory.response_len, trajectory.block_size)  # a short answer may lie at the end of its block
        rank = np.where(steps > 0, rank, never)
        rank[trajectory.preset() & (steps == 0)] = -1
        rows = rows_by_rank(trajectory, rank)
        rows = Rows(masked=rows.masked, scored=rows.scored, step=np.full(len(rows), -1, np.int32))
        if self.fraction >= 1 or not len(rows):
            return rows
        count = max(1, round(self.fraction * len(rows)))
        keep = np.sort(rng.choice(len(rows), count, replace=False))
        weight = np.full(count, len(rows) / count, np.float32)
        return Rows(masked=rows.masked[keep], scored=rows.scored[keep], step=rows.step[keep], weight=weight)


@dataclass(frozen=True, slots=True)
class AllMasked:
    """The whole response from the prompt alone (diffu-GRPO, arXiv 2504.12216; block models: every block from the blocks before
    it). The reference also masks prompt tokens with probability .15; our prompts stay clean."""

    @property
    def replays_rollout(self) -> bool:
        return False

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        steps = trajectory.step_map()
        rank = np.where(steps > 0, 0, trajectory.response_len)
        rank[trajectory.preset() & (steps == 0)] = -1
        rows = rows_by_rank(trajectory, rank)
        return Rows(masked=rows.masked, scored=rows.scored, step=np.full(len(rows), -1, np.int32))
