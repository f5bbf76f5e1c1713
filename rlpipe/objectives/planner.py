"""Row planners: from a trajectory to the noisy rows to train on. Pure; randomness comes from the caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlpipe.errors import ConfigError
from rlpipe.objectives.rows import Rows
from rlpipe.trajectory import REMASK, Trajectory


class Planner(Protocol):
    """`replays_rollout`: the rows show exactly the states that the sampler saw, so log-probabilities compare.

    A planner that has to see all responses of a step at once has `plan_all(trajectories, rng) -> list[Rows]` instead of `plan`;
    one whose rows carry an advantage of their own per denoising step has `needs_step_rewards = True`.
    """

    @property
    def replays_rollout(self) -> bool: ...

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows: ...


@dataclass(frozen=True, slots=True)
class Replay:
    """The rollout's own states, `shrink` denoising steps to a row; see `plan_replay`. tail: tokens behind EOS are scored too
    (CJ-GRPO)."""

    shrink: int = 1
    tail: bool = False

    @property
    def replays_rollout(self) -> bool:
        return self.shrink == 1

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        steps = trajectory.step_map()
        return rows_by_rank(trajectory, step_ranks(trajectory, self.shrink, steps), self.tail, steps)


@dataclass(frozen=True, slots=True)
class RandomMask:
    """`draws` random maskings of the final response at noise levels in (low, high); see `random_rows`."""

    draws: int = 1
    low: float = 0.1
    high: float = 0.9

    @property
    def replays_rollout(self) -> bool:
        return False

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        return random_rows(trajectory, rng, self.draws, self.low, self.high)


def collapse_steps(steps: np.ndarray, shrink: int, blocks: np.ndarray | None = None) -> np.ndarray:
    """steps int[L], every run of `shrink` distinct steps renamed to the largest of the run, block by block.

    blocks int[L], not negative, default one block. Example: [1, 3, 2, 4, 6, 5] with shrink 2 gives
    [2, 4, 2, 4, 6, 6]. Raises ConfigError if shrink < 1. Source: TraceRL, arXiv 2509.06949.
    """
    steps = np.asarray(steps)
    blocks = np.zeros(len(steps), np.int64) if blocks is None else np.asarray(blocks)
    rank = slice_ranks(steps, blocks, shrink)
    _, slices = np.unique(blocks * (len(steps) + 1) + rank, return_inverse=True)
    last = np.full(len(steps), np.iinfo(steps.dtype).min, steps.dtype)
    np.maximum.at(last, slices, steps)
    return last[slices]


def slice_ranks(steps: np.ndarray, blocks: np.ndarray, shrink: int) -> np.ndarray:
    """int64[L]: for each token the dense rank of its step among the distinct steps of its block, divided by `shrink`.

    steps, blocks int[L], blocks not negative. Raises ConfigError if shrink < 1.
    """
    if shrink < 1:
        raise ConfigError(f"algo.shrink={shrink}: the number of denoising steps merged into a row must be at least 1")
    order = np.lexsort((steps, blocks))
    opens_block = _differs(blocks[order])
    opens_step = opens_block | _differs(steps[order])
    dense = np.cumsum(opens_step) - 1
    first = np.maximum.accumulate(np.where(opens_block, dense, 0))
    rank = np.empty(len(steps), np.int64)
    rank[order] = (dense - first) // shrink
    return rank


def _differs(values: np.ndarray) -> np.ndarray:
    """bool[L]: the value is another than the one before it; the first always is."""
    found = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=found[1:])
    return found


def response_blocks(trajectory: Trajectory) -> np.ndarray:
    """int64[L]: block of the absolute grid that each response token lies in; all 0 under full attention."""
    position = trajectory.prompt_len + np.arange(trajectory.response_len)
    return position // trajectory.block_size if trajectory.block_size else np.zeros_like(position)


def counted_tokens(trajectory: Trajectory) -> np.ndarray:
    """bool[L]: the tokens of the final answer that count: valid, committed and drawn. As `Trajectory.loss_mask`, without
    needing a step map."""
    log, length = trajectory.events, trajectory.response_len
    filled = np.zeros(length, bool)
    filled[log.position] = log.kind != REMASK  # events are in order of time and the last assignment wins
    return filled & ~trajectory.preset() & (np.arange(length) < trajectory.valid_len)


def plan_replay(trajectory: Trajectory, shrink: int = 1) -> Rows:
    """The states before each slice of `shrink` denoising steps, with the slice's tokens scored.

    rank = `slice_ranks` inside the token's block (block models: all blocks advance side by side, so a response needs
    at most ceil(B / shrink) rows) or over the whole response (full attention: a row a slice). Row r masks rank >= r
    and scores rank == r where the loss mask allows it. Positions that were never committed stay masked in every row;
    tokens after `valid_len` keep their ranks and are shown as they were, but never scored; rows that would score
    nothing are left out. Each token of the loss mask is scored exactly once.

    Raises NoStepMap if tokens changed after their commit, ConfigError if shrink < 1.
    Source: TraceRL, arXiv 2509.06949. Its published code differs in three points, on purpose not followed here: its
    block grid starts at the response instead of position 0, so that the learner's context is not the sampler's unless
    the prompt fills whole blocks; it cuts the terminal block at EOS and shows MASK for tokens that the sampler had
    committed; and it counts the padding to be trained per row for block models but per sequence for full attention.
    """
    return rows_by_rank(trajectory, step_ranks(trajectory, shrink))


def step_ranks(trajectory: Trajectory, shrink: int = 1, steps: np.ndarray | None = None) -> np.ndarray:
    """int64[L]: which row of a replay scores a token: its slice of `shrink` steps inside its block; -1 for tokens that were
    fixed beforehand, L for those that were never committed. steps: the trajectory's step map, if the caller has it."""
    steps = trajectory.step_map() if steps is None else steps
    committed = np.flatnonzero(steps)
    rank = np.full(trajectory.response_len, trajectory.response_len, np.int64)
    rank[trajectory.preset() & (steps == 0)] = -1
    rank[committed] = slice_ranks(steps[committed], response_blocks(trajectory)[committed], shrink)
    return rank


def rows_by_rank(trajectory: Trajectory, rank: np.ndarray, tail: bool = False, steps: np.ndarray | None = None) -> Rows:
    """Row r masks the tokens of rank >= r and scores those of rank r that count; rows that would score nothing are left out.
    tail: what the sampler drew behind `valid_len` is scored too. steps: the trajectory's step map, if the caller has it."""
    steps = trajectory.step_map() if steps is None else steps
    counted = (steps > 0) & ~trajectory.preset()
    if not tail:
        counted[trajectory.valid_len :] = False
    drawn = np.flatnonzero(steps)
    first = np.full(rank.max(initial=0) + 1, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(first, rank[drawn], steps[drawn] - 1)
    kept = np.unique(rank[counted])
    return Rows(masked=rank >= kept[:, None], scored=(rank == kept[:, None]) & counted, step=first[kept])


def random_rows(trajectory: Trajectory, rng: np.random.Generator, draws: int = 1, low: float = 0.1, high: float = 0.9) -> Rows:
    """`draws` rows, each masking the counted tokens of the final response at random and scoring what it masks.

    The noise level is uniform in (low, high): one a row under full attention, one a token for block models, whose
    blocks are denoised independently. Tokens that do not count (after `valid_len`, or never committed) are masked and
    not scored. A draw that masks no counted token masks one of them at random, so that no response drops out; a
    response without counted tokens has no rows. Needs no step map. Source: the random-masking baseline of TraceRL,
    arXiv 2509.06949.
    """
    length, preset, counted = trajectory.response_len, trajectory.preset(), counted_tokens(trajectory)
    rows = draws if counted.any() else 0
    level = rng.uniform(low, high, (rows, length if trajectory.block_size else 1))
    scored = (rng.random((rows, length)) < level) & counted
    bare = np.flatnonzero(~scored.any(1))
    if len(bare):
        scored[bare, rng.choice(np.flatnonzero(counted), len(bare))] = True
    return Rows(masked=scored | ~(counted | preset), scored=scored, step=np.full(rows, -1, np.int32))
