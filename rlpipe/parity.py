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


def diversity(groups: Sequence[Sequence[str]]) -> float:
    """Mean share of distinct responses in a group: 1/G when all are the same, 1 when none is repeated."""
    return float(np.mean([len(set(texts)) / len(texts) for texts in groups]))


def check(metrics: dict[str, float], config: ParityConfig, step: int) -> None:
    """Raises ParityError past the recipe's limit: training on such ratios would be noise."""
    worst = metrics.get("parity/max_abs_delta", 0.0)
    if config.max_abs_delta and not worst <= config.max_abs_delta:
        raise ParityError(
            f"step {step}: learner and rollout differ by {worst:.3g} nats on a token (limit parity.max_abs_delta="
            f"{config.max_abs_delta:g}; mean KL {metrics['parity/mean_kl']:.3g}). The weights were compared by checksum, so "
            "look at the attention plan, the dtype (bfloat16 needs a higher limit) or the decoder's temperature"
        )
