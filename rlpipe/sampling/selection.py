"""Which masked positions to commit: scorers give a number per position, selectors turn numbers into a set.

All tensors are [slots, B]; only `masked` positions count. Larger scores go first, ties to the lowest position. A scorer that
looks at the state only (everything but `sampled_prob`) makes the product of committed-token probabilities the exact
transition probability; see `Scorer.state_only`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlpipe.sampling.statistics import RowStatistics


@dataclass(frozen=True, slots=True)
class Scorer:
    """`score(statistics laid out as [slots, B], position int64 [slots, B], noise float64 [slots, B]) → float32 [slots, B]`."""

    score: Callable[[RowStatistics, torch.Tensor, torch.Tensor], torch.Tensor]
    state_only: bool


SCORERS = {
    "max_prob": Scorer(lambda s, position, noise: s.p_max, True),
    "entropy": Scorer(lambda s, position, noise: -s.entropy, True),
    "margin": Scorer(lambda s, position, noise: s.p_max - s.p_second, True),
    "random": Scorer(lambda s, position, noise: noise.float(), True),
    "left_to_right": Scorer(lambda s, position, noise: -position.float(), True),
    # LLaDA and SDAR as published: the drawn token's own probability, so which positions commit depends on the draws.
    "sampled_prob": Scorer(lambda s, position, noise: s.p_token, False),
}


def ranks(score: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """int64 [slots, B]: 0 for the best masked position; unmasked ones come last."""
    ordered = torch.where(masked, score, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return ordered.argsort(dim=-1)


def select_static(score: torch.Tensor, masked: torch.Tensor, quota: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `quota` masked positions of each slot → (commit, forced), both bool [slots, B]."""
    return masked & (ranks(score, masked) < quota), torch.zeros_like(masked)


def select_threshold(
    score: torch.Tensor, masked: torch.Tensor, quota: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All masked positions with score ≥ threshold; where fewer than `quota` pass, the best `quota` (marked forced).

    SDAR's dynamic rule (which uses >); Fast-dLLM's with quota 1.
    """
    passed = masked & (score >= threshold)
    best = masked & (ranks(score, masked) < quota)
    short = passed.sum(-1, keepdim=True) < quota
    return torch.where(short, best | passed, passed), short & best & ~passed
