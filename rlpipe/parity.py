"""The parity gauge: do learner and rollout agree about the log-probability of the same tokens?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlpipe.config import ParityConfig
from rlpipe.errors import ParityError


def gauge(learner: np.ndarray, rollout: np.ndarray, clip_low: float, clip_high: float) -> dict[str, float]:
    """learner, rollout: float32 [M] log-probabilities of the same tokens under the same weights.

    max_abs_delta and mean_abs_delta in nats; mean_kl: mean of exp(d) - 1 - d with d = learner - rollout (k3, never negative);
    clipped_share: tokens whose ratio lies outside the clip range before any update; tokens: M.
    """
    if not len(learner):
        return {"parity/tokens": 0.0}
    delta = learner.astype(np.float64) - rollout.astype(np.float64)
    ratio = np.exp(np.clip(delta, -20, 20))
    return {
        "parity/max_abs_delta": float(np.abs(delta).max()),
        "parity/mean_abs_delta": float(np.abs(delta).mean()),
        "parity/mean_kl": float((ratio - 1 - np.clip(delta, -20, 20)).mean()),
        "parity/clipped_share": float(((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).mean()),
        "parity/tokens": float(len(delta)),
    }


def gap(learner: np.ndarray, rollout: np.ndarray) -> dict[str, float]:
    """How far the sampler's distribution was from the learner's where they are known to differ (approximate caches, fused or
    cut distributions); nothing stops for it, the loss weighs the tokens instead. Empty if there are none."""
    if not len(learner):
        return {}
    delta = learner.astype(np.float64) - rollout.astype(np.float64)
    return {
        "parity/gap_max_abs": float(np.abs(delta).max()),
        "parity/gap_mean_abs": float(np.abs(delta).mean()),
        "parity/gap_tokens": float(len(delta)),
    }


def stale(learner: np.ndarray, rollout: np.ndarray, lag: np.ndarray) -> dict[str, float]:
    """Tokens that older weights drew; learner: log-probabilities under those that open the step, rollout: as recorded, lag
    int[M]: weight versions between the two. Nothing stops for them, the loss weighs them. Empty if there are none.

    stale_gap_K: mean of d = learner - rollout in nats, of lag K: minus the mean KL divergence of K versions of training ·
    stale_ratio: mean of exp(d) over all of them, 1 in expectation whatever the lag, so it is what is left to look at in a step
    that has no token to compare: further from 1 than a few stale_ratio_error (its standard error), learner and rollout differ
    in more than their weights · stale_tokens: how many.
    """
    if not len(learner):
        return {}
    delta = learner.astype(np.float64) - rollout.astype(np.float64)
    ratio = np.exp(np.clip(delta, -20, 20))
    return {f"parity/stale_gap_{k}": float(delta[lag == k].mean()) for k in np.unique(lag)} | {
        "parity/stale_ratio": float(ratio.mean()),
        "parity/stale_ratio_error": float(ratio.std() / np.sqrt(len(ratio))),
        "parity/stale_tokens": float(len(ratio)),
    }


def measure(
    learner: np.ndarray, rollout: np.ndarray, exact: np.ndarray, lag: np.ndarray, clip_low: float, clip_high: float
) -> dict[str, float]:
    """All parity/ metrics of a step's tokens [M]: the `gauge` of those that should agree (exact bool[M]), the `gap` of another
    law under the same weights (lag 0), and what is `stale` (lag int[M])."""
    other, old = ~exact & (lag == 0), lag != 0
    return (
        gauge(learner[exact], rollout[exact], clip_low, clip_high)
        | gap(learner[other], rollout[other])
        | stale(learner[old], rollout[old], lag[old])
    )


def diversity(groups: Sequence[Sequence[str]]) -> float:
    """Mean share of distinct responses in a group: 1/G when all are the same, 1 when none is repeated."""
    return float(np.mean([len(set(texts)) / len(texts) for texts in groups]))


DOUBT = 5.0  # standard errors


def doubts(metrics: dict[str, float]) -> str:
    """What speaks against agreement in a step whose tokens older weights drew; empty if nothing does. A warning, not an error:
    few heavy ratios can make a mean."""
    ratio, error = metrics.get("parity/stale_ratio", 1.0), metrics.get("parity/stale_ratio_error", 0.0)
    if not error or abs(ratio - 1.0) <= DOUBT * error:
        return ""
    return (
        f"tokens of older weights have a mean probability ratio of {ratio:.3f} ± {error:.3f}, where 1 is expected: learner and "
        "rollout may differ in more than their weights; max_lag=0 lets the parity gauge compare them"
    )


def check(metrics: dict[str, float], config: ParityConfig, step: int) -> None:
    """Raises ParityError past the recipe's limit: training on such ratios would be noise."""
    worst = metrics.get("parity/max_abs_delta", 0.0)
    if config.max_abs_delta and not worst <= config.max_abs_delta:
        raise ParityError(
            f"step {step}: learner and rollout differ by {worst:.3g} nats on a token (limit parity.max_abs_delta="
            f"{config.max_abs_delta:g}; mean KL {metrics['parity/mean_kl']:.3g}). The weights were compared by checksum, so "
            "look at the attention plan, the dtype (bfloat16 needs a higher limit) or the decoder's temperature"
        )
