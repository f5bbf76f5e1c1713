"""What a loss reports about itself: sums that add over micro-batches and ranks, and the metrics made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlpipe.errors import RlpipeError
from rlpipe.objectives.losses import Clip, clip_is_active, importance_weight, kl_penalty, ratio_of


@dataclass(frozen=True, slots=True)
class LossTerms:
    """loss: scalar to backward, this micro-batch's share of the update's · sums: detached scalars by name; they add,
    except that names starting with `max_` keep the largest."""

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


@torch.no_grad()
def ratio_sums(
    logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, clip: Clip | None
) -> dict[str, torch.Tensor]:
    """Sums over the units [U] that show how far the policy has moved from the one that opened the step. clip: None for a loss
    that clips nothing."""
    drift = (logp - old_logp).float().abs()
    none = torch.zeros_like(drift, dtype=torch.bool)
    low, high = (none, none) if clip is None else clip_is_active(logp, old_logp, advantage, clip)
    return {
        "units": torch.full_like(drift, 1.0).sum(),
        "ratio": ratio_of(logp, old_logp).float().sum(),
        "clipped_low": low.float().sum(),
        "clipped_high": high.float().sum(),
        "approx_kl": kl_penalty(logp, old_logp, "k3").float().sum(),
        "max_abs_log_ratio": drift.amax() if drift.numel() else drift.new_zeros(()),
    }


@torch.no_grad()
def importance_sums(log_ratio: torch.Tensor, cap: float) -> dict[str, torch.Tensor]:
    """Sums over the units [U] that another distribution drew (log_ratio not NaN), of which there is at least one; the largest
    ratio is that before truncation."""
    log_ratio = log_ratio[~log_ratio.isnan()]
    weight = importance_weight(log_ratio, cap).float()
    return {
        "off_policy_units": torch.full_like(weight, 1.0).sum(),
        "importance": weight.sum(),
        "truncated": (weight >= cap).float().sum(),
        "max_importance": importance_weight(log_ratio, math.inf).float().max(),
        "max_negated_importance": -weight.min(),  # sums keep the largest, and this is how they keep the smallest
    }


def finalize(sums: Mapping[str, Any], updates: int = 1) -> dict[str, float]:
    """Metrics algo/… from the sums over `updates` whole updates: losses are means over updates, the entropy over scored tokens,
    the rest over units of the ratio.

    Raises RlpipeError if the loss is not finite: the weights are then lost, and nothing after it may be kept.
    """
    values = {name: float(value) for name, value in sums.items()}
    tokens, units = max(values.get("tokens", 0.0), 1.0), max(values.get("units", 0.0), 1.0)
    metrics = {f"algo/{name}": values.get(name, 0.0) / updates for name in ("loss", "policy_loss", "kl_loss")}
    if not math.isfinite(metrics["algo/loss"]):
        raise RlpipeError(
            f"the loss of an update is {metrics['algo/loss']} (policy {metrics['algo/policy_loss']}, KL "
            f"{metrics['algo/kl_loss']}). Go back to the last checkpoint with a lower learner.lr; if it is the very "
            "first update, a scored token has probability 0: compare the suppressed token ids with the rollout's"
        )
    metrics |= {
        "algo/ratio_mean": values.get("ratio", 0.0) / units,
        "algo/clip_fraction_low": values.get("clipped_low", 0.0) / units,
        "algo/clip_fraction_high": values.get("clipped_high", 0.0) / units,
        "algo/approx_kl": values.get("approx_kl", 0.0) / units,
        "algo/max_abs_log_ratio": values.get("max_abs_log_ratio", 0.0),
        "algo/scored_tokens": values.get("tokens", 0.0) / updates,
    }
    metrics["algo/clip_fraction"] = metrics["algo/clip_fraction_low"] + metrics["algo/clip_fraction_high"]
    if "off_policy_units" in values:
        metrics["algo/importance_mean"] = values["importance"] / max(values["off_policy_units"], 1.0)
        metrics["algo/importance_min"] = -values["max_negated_importance"]
        metrics["algo/importance_max"] = values["max_importance"]
        metrics["algo/importance_truncated"] = values["truncated"] / max(values["off_policy_units"], 1.0)
    if "stale_tokens" in values:
        metrics["algo/stale_share"] = values["stale_tokens"] / tokens
        metrics["algo/uncorrected_share"] = values["uncorrected_tokens"] / tokens
    if "ref_kl" in values:
        metrics["algo/ref_kl"] = values["ref_kl"] / units
    if "entropy" in values:
        metrics["algo/entropy"] = values["entropy"] / tokens
    return metrics


def finalize_updates(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of a step from its optimizer updates.

    updates: dicts with `sums` (over micro-batches and ranks), `grad_norm` and `lr`. Gradient norm: mean and largest;
    learning rate: of the last update. Raises RlpipeError if any loss or gradient norm is not finite.
    """
    if not updates:
        return {"algo/updates": 0.0}
    total: dict[str, float] = {}
    for update in updates:
        finalize(update["sums"])  # refuses a loss that is not finite, whatever the others are
        for name, value in update["sums"].items():
            largest = name.startswith("max_")
            before = total.get(name, -math.inf if largest else 0.0)
            total[name] = max(before, float(value)) if largest else before + float(value)
    norms = [float(update["grad_norm"]) for update in updates]
    if not all(map(math.isfinite, norms)):
        raise RlpipeError(
            f"gradient norms of the step's updates are {norms}: the weights are lost. Go back to the last checkpoint "
            "with a lower learner.lr, and look for an overflow if model.dtype is not float32"
        )
    return finalize(total, len(updates)) | {
        "algo/grad_norm": sum(norms) / len(norms),
        "algo/grad_norm_max": max(norms),
        "algo/lr": float(updates[-1]["lr"]),
        "algo/updates": float(len(updates)),
    }
