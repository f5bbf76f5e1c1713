"""Losses of flat [U] tensors of units: tokens, or what joins them (`rlpipe.objectives.units`). Elementwise: reducers decide how
much each unit weighs.

Everything is computed in float32 at least, whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlpipe.errors import ConfigError

KL_ESTIMATORS = ("k1", "k2", "k3")
LOG_RATIO_BOUND = 10.0  # |log ratio| beyond which a ratio is held constant: its exp() could overflow
DYNAMIC_CEILING = 10.0  # of the upper bound of `Clip.dynamic`, which grows without end as probabilities fall


@dataclass(frozen=True, slots=True)
class Clip:
    """How far a ratio may go before its gradient stops.

    low, high: the bounds are 1 - low and 1 + high (arXiv 1707.06347; high > low: DAPO, arXiv 2503.14476) · dual: where the
    advantage is negative, the loss is at most dual · |advantage|; 0 is off (arXiv 1912.09729) · dynamic: the bounds depend on
    the probability q that the unit had, see `bounds` (DCPO, arXiv 2509.02333).
    """

    low: float
    high: float
    dual: float = 0.0
    dynamic: bool = False

    def bounds(self, old_logp: torch.Tensor) -> tuple[float, float] | tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper bound of the ratio: two numbers, or two tensors [U] if dynamic: (1 + sqrt(max(1 - 4·low/q, 0))) / 2
        and (1 + sqrt(1 + 4·high/q)) / 2, the latter at most 10, with q = exp(old_logp)."""
        if not self.dynamic:
            return 1.0 - self.low, 1.0 + self.high
        inverse = (-_float(old_logp)).clamp(max=60.0).exp()  # 1/q, kept finite: 0 · inf is not a bound
        lower = 0.5 + 0.5 * (1.0 - 4.0 * self.low * inverse).clamp(min=0.0).sqrt()
        upper = 0.5 + 0.5 * (1.0 + 4.0 * self.high * inverse).sqrt()
        return lower, upper.clamp(max=DYNAMIC_CEILING)


@dataclass(frozen=True, slots=True)
class Certainty:
    """Certainty forcing (dParallel, arXiv 2509.26488): + entropy_weight · entropy of softmax(logits / entropy_temperature) on
    the scored tokens whose most likely prediction is already right.

    Such an entropy counts with its token's own weight, so that the term adds up over any split of an update. The published code
    divides by the number of right tokens of a micro-batch instead: the two agree as that number grows to all.
    """

    entropy_weight: float = 2.0
    entropy_temperature: float = 0.5

    def __post_init__(self) -> None:
        if self.entropy_weight < 0 or self.entropy_temperature <= 0:
            raise ConfigError(
                f"algo.options.entropy_weight={self.entropy_weight} must not be negative, entropy_temperature="
                f"{self.entropy_temperature} must be above 0"
            )


def ratio_of(logp: torch.Tensor, old_logp: torch.Tensor, log_ratio_bound: float = LOG_RATIO_BOUND) -> torch.Tensor:
    """p_new / p_old of each unit [U], its logarithm clamped to ±log_ratio_bound (as TraceRL's published block code does)."""
    return (_float(logp) - _float(old_logp)).clamp(-log_ratio_bound, log_ratio_bound).exp()


def policy_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, clip: Clip) -> torch.Tensor:
    """PPO-clip [U], to be minimised: -min(ratio·A, clamp(ratio, bounds)·A); where A < 0 and clip.dual is on, at most
    -dual·A."""
    ratio, advantage = ratio_of(logp, old_logp), _float(advantage)
    clipped = ratio.clamp(*clip.bounds(old_logp))
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if clip.dual:
        loss = torch.where(advantage < 0, torch.minimum(loss, -clip.dual * advantage), loss)
    return loss


def likelihood_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, clip: Clip) -> torch.Tensor:
    """-A · log p of each unit [U]: the policy gradient without a ratio, so old_logp and clip do not matter (wd1, arXiv
    2507.08838; SPG, arXiv 2510.09541)."""
    return -_float(advantage) * _float(logp)


def importance_weight(log_ratio: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_old / p_behaviour, cap) of each unit [U] from its logarithm, 1 where that is NaN: truncated importance sampling
    (Ionides 2008) for units that were not drawn by the policy which opened the step (older weights, approximate caches, fused
    or cut distributions)."""
    return torch.where(log_ratio.isnan(), 1.0, log_ratio.clamp(max=LOG_RATIO_BOUND).exp().clamp(max=cap))


def clip_is_active(
    logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high), bool [U]: units whose gradient PPO-clip stops: at the lower bound (A < 0), at the upper bound (A > 0) or at
    the dual clip's (A < 0)."""
    ratio = ratio_of(logp, old_logp)
    lower, upper = clip.bounds(old_logp)
    high = (ratio > upper) & (advantage > 0)
    if clip.dual:
        high |= (ratio > clip.dual) & (advantage < 0)
    return (ratio < lower) & (advantage < 0), high


def kl_penalty(logp: torch.Tensor, ref_logp: torch.Tensor, kind: str, log_ratio_bound: float = LOG_RATIO_BOUND) -> torch.Tensor:
    """Estimates [U] of KL(policy ‖ reference) from units of the policy, with d = logp - ref_logp.

    k1: d (unbiased, but its gradient averages to zero where the tokens came from the policy itself) · k2: d²/2 ·
    k3: exp(-d) - 1 + d, never negative, the exponent clamped to ±log_ratio_bound. Source: Schulman, "Approximating KL
    divergence", 2020; signs and clamp as in TraceRL's published code. Raises ValueError for another kind.
    """
    d = _float(logp) - _float(ref_logp)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return torch.expm1((-d).clamp(-log_ratio_bound, log_ratio_bound)) + d
    raise ValueError(f"KL estimator '{kind}' is none of {', '.join(KL_ESTIMATORS)}")


def value_loss(value: torch.Tensor, old_value: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """Clipped value loss [T]: half the larger of (V - R)² and (V_old + clamp(V - V_old, ±clip) - R)².

    `clip` is in units of the reward. Source: TraceRL's value model, arXiv 2509.06949, after PPO's reference code.
    """
    value, old_value, returns = _float(value), _float(old_value), _float(returns)
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns).square(), (near - returns).square())


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
