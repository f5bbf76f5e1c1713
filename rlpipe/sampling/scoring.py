"""What a selector sees of a step, and the scores that order positions.

All tensors are [slots, B]; only `masked` positions count. Larger scores go first, ties to the lowest position. A scorer that
looks at the state only (everything but `sampled_prob`, and EOSER's factor) makes the product of committed-token probabilities
the exact transition probability; see `Scorer.state_only`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlpipe.sampling.schedule import Schedule
from rlpipe.sampling.statistics import RowStatistics


class StepView(NamedTuple):
    """score float32, masked bool, statistics, noise (float64 uniforms that order positions): [slots, B] · quota, time, opened,
    length int64 [slots]: what the schedule would commit, its 0-based step, the masks when the block was opened, the block's
    positions · schedule · settled float32 [slots]: mean confidence of what the block has committed so far, NaN for nothing;
    stable int64 [slots, B]: steps in a row whose distribution hardly moved; both only for selectors that ask (`uses`)."""

    score: torch.Tensor
    masked: torch.Tensor
    statistics: RowStatistics
    noise: torch.Tensor
    quota: torch.Tensor
    time: torch.Tensor
    opened: torch.Tensor
    length: torch.Tensor
    schedule: Schedule
    settled: torch.Tensor | None = None
    stable: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Scorer:
    """`score(statistics laid out as [slots, B], position int64 [slots, B], noise float64 [slots, B]) → float32 [slots, B]`.
    needs: statistics that cost a pass of their own."""

    score: Callable[[RowStatistics, torch.Tensor, torch.Tensor], torch.Tensor]
    state_only: bool
    needs: frozenset[str] = frozenset()


SCORERS = {
    "max_prob": Scorer(lambda s, position, noise: s.p_max, True),
    "entropy": Scorer(lambda s, position, noise: -s.entropy, True, frozenset({"entropy"})),
    "margin": Scorer(lambda s, position, noise: s.p_max - s.p_second, True, frozenset({"p_second"})),
    "random": Scorer(lambda s, position, noise: noise.float(), True),
    "left_to_right": Scorer(lambda s, position, noise: -position.float(), True),
    # LLaDA and SDAR as published: the drawn token's own probability, so which positions commit depends on the draws.
    "sampled_prob": Scorer(lambda s, position, noise: s.p_token, False),
}


def ranks(score: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """int64 [slots, B]: 0 for the best masked position; unmasked ones come last."""
    ordered = torch.where(masked, score, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[1], device=score.device).expand_as(ordered)
    return torch.empty_like(ordered).scatter_(1, ordered, places)


def best(view: StepView, count: torch.Tensor | int) -> torch.Tensor:
    """bool [slots, B]: the `count` best masked positions of every slot."""
    count = count.unsqueeze(-1) if isinstance(count, torch.Tensor) else count
    return view.masked & (ranks(view.score, view.masked) < count)


def in_order(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`values` [slots, B] sorted so that rank 0 comes first; `order` are the ranks."""
    return torch.empty_like(values).scatter(1, order, values)


def shuffled(score: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """Score + Gumbel noise · temperature: its top k are a draw without replacement from softmax(score / temperature), the law
    of Dream's alg_temp."""
    gumbel = -torch.log(-torch.log(noise.clamp(2.0**-53, 1 - 2.0**-53)))
    return (score.double() + temperature * gumbel).float()
