"""Advantages of the responses to one prompt, relative to their group."""

from __future__ import annotations

from difflib import get_close_matches

import numpy as np

from rlpipe.errors import ConfigError, VerifierFailed

ADVANTAGES = ("zscore", "mean", "leave_one_out", "softmax")


def group_advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """rewards float[G] of one group → advantages float32[G]; all zero if the rewards are all equal.

    zscore: (r - mean) / population standard deviation, nothing added to it (GRPO, arXiv 2402.03300; TraceRL) · mean:
    r - mean (Dr.GRPO, arXiv 2503.20783) · leave_one_out: r - mean of the others (RLOO, arXiv 2402.14740) · softmax: G times
    the difference of `softmax_weights`, so that a mean over responses is the published sum over a group (wd1, arXiv
    2507.08838). Raises ConfigError for another kind, VerifierFailed if a reward is not finite.
    """
    if kind not in ADVANTAGES:
        nearest = get_close_matches(kind, ADVANTAGES, 1, 0.0)[0]
        raise ConfigError(f"algo.advantage={kind}: known are {', '.join(ADVANTAGES)}; did you mean {nearest}?")
    rewards = _finite(rewards)
    if not len(rewards) or np.ptp(rewards) == 0:  # rounding of the mean must not become a signal
        return np.zeros(len(rewards), np.float32)
    if kind == "softmax":
        raised, lowered = softmax_weights(rewards)
        return (len(rewards) * (raised - lowered)).astype(np.float32)
    centred = rewards - rewards.mean()
    if kind == "zscore":
        centred /= rewards.std()
    elif kind == "leave_one_out":
        centred *= len(rewards) / (len(rewards) - 1)
    return centred.astype(np.float32)


def softmax_weights(rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """rewards float[G] of one group → (softmax(r), softmax(-r)), float64[G] each, sums 1: how much each response is raised and
    lowered. Only differences of rewards matter. Source: wd1, arXiv 2507.08838."""
    raised, lowered = np.exp(rewards - rewards.max()), np.exp(rewards.min() - rewards)
    return raised / raised.sum(), lowered / lowered.sum()


def has_signal(rewards: np.ndarray, low: float = 0.0, high: float = 1.0) -> bool:
    """True if a group teaches something: its rewards [G] differ and, where they are all 0 or 1, low < mean < high.

    Raises VerifierFailed if a reward is not finite. Source of the band: dynamic sampling of DAPO, arXiv 2503.14476.
    """
    rewards = _finite(rewards)
    if not len(rewards) or np.ptp(rewards) == 0:
        return False
    binary = bool(np.isin(rewards, (0.0, 1.0)).all())
    return low < float(rewards.mean()) < high if binary else True


def _finite(rewards: np.ndarray) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    if not np.isfinite(rewards).all():
        raise VerifierFailed(f"rewards {rewards.tolist()} are not all finite; make the verifier return a number or raise")
    return rewards
