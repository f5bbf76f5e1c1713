"""Over-long answers as an explicit choice: what the reward of a response is worth that used its budget up without ending."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlpipe.trajectory import Trajectory


def is_overlong(trajectory: Trajectory) -> bool:
    """It stopped because its tokens ran out, and not by EOS; its text is not asked."""
    return trajectory.stop == "length"


def shaped(rewards: np.ndarray, trajectories: Sequence[Trajectory], choice: str, budget: int, buffer: int) -> np.ndarray:
    """rewards float32[G] of a group as its advantages are made of them, float32[G].

    score, drop: unchanged; what is dropped is decided by `kept` · zero: over-long responses get 0 · soft: `penalty` is added
    to all.
    """
    if choice == "zero":
        return np.where([is_overlong(t) for t in trajectories], 0.0, rewards).astype(np.float32)
    if choice == "soft":
        return (rewards + [penalty(t, budget, buffer) for t in trajectories]).astype(np.float32)
    return rewards


def penalty(trajectory: Trajectory, budget: int, buffer: int) -> float:
    """0 up to `budget` - `buffer` valid tokens, from there falling in a straight line to -1 at `budget`; -1 for an over-long
    response. buffer 0: a quarter of the budget. Source: DAPO's soft over-long punishment, arXiv 2503.14476, eq. 13."""
    if is_overlong(trajectory):
        return -1.0
    buffer = buffer or max(1, budget // 4)
    return -min(1.0, max(0, trajectory.valid_len - (budget - buffer)) / buffer)


def kept(trajectories: Sequence[Trajectory], choice: str) -> np.ndarray:
    """bool[G]: the responses of a group that the loss sees. Under drop the over-long ones are left out of the loss and of its
    denominators, while their rewards still count in the group's mean and deviation."""
    return np.array([choice != "drop" or not is_overlong(t) for t in trajectories], bool)
