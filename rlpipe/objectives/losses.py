"""Per-token losses on flat [T] tensors of scored tokens. Elementwise: reducers decide how much each token weighs.

Everything is computed in float32 at least, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

KL_ESTIMATORS = ("k1", "k2", "k3")
LOG_RATIO_BOUND = 10.0  # |log ratio| beyond which a ratio is held constant: its exp() could overflow

RatioUnit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def token_log_ratio(logp: torch.Tensor, old_logp: torch.Tensor) -> torch.Tensor:
    """log p_new - log p_old of each token [T]: the ratio unit 'token'. Other units spread a sum over their tokens."""
    return _float(logp) - _float(old_logp)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
    log_ratio_bound: float = LOG_RATIO_BOUND,
    ratio_unit: RatioUnit = token_log_ratio,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO-clip: (per_token_loss [T], ratio [T]); the loss is to be minimised.

    ratio = exp(clamp(log ratio, ±log_ratio_bound)); loss = -min(ratio·A, clamp(ratio, 1 - clip_low, 1 + clip_high)·A).
    Sources: arXiv 1707.06347, with the bound of TraceRL's published block code; clip_high > clip_low: DAPO,
    arXiv 2503.14476.
    """
    ratio = ratio_unit(logp, old_logp).clamp(-log_ratio_bound, log_ratio_bound).exp()
    advantage = _float(advantage)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage), ratio


def importance_weight(old_logp: torch.Tensor, behaviour_logp: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_old / p_behaviour, cap) of each token [T], 1 where behaviour_logp is NaN: truncated importance sampling for tokens
    that were not drawn from the policy which opened the step (approximate caches, fused or cut distributions)."""
    weight = (_float(old_logp) - _float(behaviour_logp)).clamp(max=LOG_RATIO_BOUND).exp().clamp(max=cap)
    return torch.where(behaviour_logp.isnan(), 1.0, weight)


def clip_is_active(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high), bool [T]: tokens whose gradient PPO-clip stops, at the lower bound (A < 0) or the upper (A > 0)."""
    return (ratio < 1.0 - clip_low) & (advantage < 0), (ratio > 1.0 + clip_high) & (advantage > 0)


def kl_penalty(logp: torch.Tensor, ref_logp: torch.Tensor, kind: str, log_ratio_bound: float = LOG_RATIO_BOUND) -> torch.Tensor:
    """Estimates [T] of KL(policy ‖ reference) from tokens of the policy, with d = logp - ref_logp.

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
