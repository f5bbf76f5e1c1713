"""Row planners that mask the final answer anew: estimators of its likelihood that do not ask how it was decoded.

Their rows show what was fixed before the first step; tokens that do not count (behind `valid_len`, or never committed) are
masked and not scored; prompts stay clean. No planner here needs a step map. For block models every block is a problem of its
own, given the clean blocks before it, and all blocks are masked side by side in the same rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from rlpipe.errors import ConfigError
from rlpipe.objectives.planner import counted_tokens, response_blocks
from rlpipe.objectives.rows import Rows
from rlpipe.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class CoupledMasks:
    """Three rows: all masked; a random part M; the rest C. With t the share masked in M,

        unit of a token = 1/2 · log p(all masked) + (log p(M) / 2t where it is in M, log p(C) / 2(1 - t) where it is in C)

    so that every token is scored twice and M and C are antithetic. Made for units of kind `position`. t is uniform in (low,
    high), one a response (block models: one a block). Source: coupled-GRPO of DiffuCoder (arXiv 2506.20639), whose code draws
    one t for all responses of a call and masks also what lies behind EOS at random.
    """

    low: float = 0.2
    high: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < 1:
            raise ConfigError(f"algo.options.low={self.low}, algo.options.high={self.high}: shares, 0 < low <= high < 1")

    @property
    def replays_rollout(self) -> bool:
        return False

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        counted, block = counted_tokens(trajectory), _dense_blocks(trajectory)
        level = rng.uniform(self.low, self.high, int(block.max(initial=0)) + 1)[block]
        first = counted & (rng.random(len(counted)) < level)
        rest = counted & ~first
        coefficient = np.stack([np.full(len(counted), 0.5), 0.5 / level, 0.5 / (1.0 - level)])
        return masked_rows(trajectory, np.stack([counted, first, rest]), coefficient)


@dataclass(frozen=True, slots=True)
class ComplementaryMasks:
    """`draws` times a random part of random size and, if `complement`, the rest: an unbiased estimate of the evidence lower
    bound, per token.

    A part masks k of the n tokens that count, k uniform over 0 … n (stratified over the draws); its tokens weigh (n + 1) / k,
    those of the rest (n + 1) / (n - k), and their mean divided by the length is the unit of kind `sequence`. For block models n
    and k are a block's own, and the bounds of the blocks add up. Source: ESPO (arXiv 2512.03759), whose code spreads k over the
    responses of a batch instead, and which scores the tail behind EOS too.
    """

    draws: int = 2
    complement: bool = True

    def __post_init__(self) -> None:
        _positive("draws", self.draws)

    @property
    def replays_rollout(self) -> bool:
        return False

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        counted, block = counted_tokens(trajectory), _dense_blocks(trajectory)
        size = np.bincount(block, counted, 1).astype(np.int64)  # tokens that count, per block
        level = np.stack([rng.permutation(self.draws) for _ in size], 1)
        level = (level + rng.random(level.shape)) / self.draws
        taken = np.minimum((level * (size + 1)).astype(np.int64), size)
        scale = 1.0 / (self.draws * (2 if self.complement else 1) * max(int(counted.sum()), 1))
        scored, coefficient = [], []
        for draw in range(self.draws):
            part = random_part(counted, block, taken[draw], rng)
            for chosen, count in [(part, taken[draw]), (counted & ~part, size - taken[draw])][: 1 + self.complement]:
                scored.append(chosen)
                coefficient.append((scale * (size + 1) / np.maximum(count, 1))[block])
        return masked_rows(trajectory, np.stack(scored), np.stack(coefficient))


@dataclass(frozen=True, slots=True)
class BlockMasks:
    """`draws` states of a decoder that goes block by block: a random number of a random block's tokens masked, all later blocks
    masked, the earlier ones clean; every masked token scored, a row's tokens by their mean, the rows by theirs.

    Blocks are `block` tokens long, counted from the start of the answer; those that count nothing are not drawn, and none is
    drawn twice before all were. For block models `block` is not used: a random number of every block's tokens is masked.
    Source: SPG (arXiv 2510.09541); the reference also masks prompt tokens and earlier blocks with probability .15, ours stay
    clean.
    """

    draws: int = 2
    block: int = 32

    def __post_init__(self) -> None:
        _positive("draws", self.draws)
        _positive("block", self.block)

    @property
    def replays_rollout(self) -> bool:
        return False

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        counted = counted_tokens(trajectory)
        if trajectory.block_size:
            block = _dense_blocks(trajectory)
        else:
            block = np.arange(len(counted)) // self.block
        size = np.bincount(block, counted, 1).astype(np.int64)
        live = np.flatnonzero(size)
        scored = []
        if len(live):
            order = rng.permutation(live)
            for draw in range(self.draws):
                part = random_part(counted, block, rng.integers(1, np.maximum(size, 1) + 1), rng)
                own = order[draw % len(order)]
                if not trajectory.block_size:
                    part = np.where(block == own, part, counted & (block > own))
                scored.append(part)
        scored = np.array(scored, bool).reshape(-1, len(counted))
        share = 1.0 / (len(scored) * scored.sum(1, keepdims=True)) if len(scored) else np.zeros((0, 1))
        return masked_rows(trajectory, scored, np.broadcast_to(share, scored.shape))


def random_part(counted: np.ndarray, block: np.ndarray, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool[L]: taken[b] of the tokens counted bool[L] of every block b, drawn without replacement. block int[L], taken
    int[blocks]; a block that has no more gives all."""
    order = np.lexsort((rng.random(len(counted)), ~counted, block))  # block by block, those that count first, at random
    start = np.searchsorted(block[order], np.arange(len(taken)))
    place = np.empty(len(counted), np.int64)
    place[order] = np.arange(len(counted)) - start[block[order]]
    return counted & (place < taken[block])


def masked_rows(trajectory: Trajectory, scored: np.ndarray, coefficient: np.ndarray) -> Rows:
    """Rows that score scored bool[R, L], a part of the tokens that count, and mask them and all that does not count; those that
    would score nothing are left out. coefficient float[R, L]."""
    given = np.zeros(trajectory.response_len, bool)
    given[trajectory.events.position[trajectory.events.step < 0]] = True
    keep = scored.any(1)
    scored = scored[keep]
    return Rows(
        masked=scored | ~(counted_tokens(trajectory) | given),
        scored=scored,
        step=np.full(len(scored), -1, np.int32),
        coefficient=np.where(scored, coefficient[keep], 0).astype(np.float32),
    )


def select_scored(rows: Rows, trajectory: Trajectory, share: float, by: str) -> Rows:
    """The rows, scoring fewer tokens: what every state shows stays, the loss leaves out what the sampler was sure of.

    by confidence: the given share in (0, 1] of a response's scored positions, at least one, whose tokens had the lowest
    probability when they were committed · forced: the tokens that were committed although none passed the selector's test (a
    response may have none). Rows that score nothing any more are left out; coefficients stay. Raises NoStepMap if tokens
    changed after their commit. The published fast variants of JustGRPO (arXiv 2601.15165) choose so, block by block.
    """
    if by == "forced":
        keep = trajectory.at_commit("forced")
    else:
        position = np.flatnonzero(rows.scored.any(0))
        count = max(1, round(share * len(position)))
        lowest = np.argsort(trajectory.at_commit("confidence")[position], kind="stable")[:count]
        keep = np.zeros(rows.response_len, bool)
        keep[position[lowest]] = True
    fewer = dataclasses.replace(rows, scored=rows.scored & keep)
    return fewer.take(fewer.scored.any(1))


def _dense_blocks(trajectory: Trajectory) -> np.ndarray:
    """int64[L]: block of each response token, counted from the response's first."""
    block = response_blocks(trajectory)
    return block - block.min(initial=block[0] if len(block) else 0)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"algo.options.{name}={value} must be at least 1")
