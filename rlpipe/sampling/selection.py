"""Which masked positions to commit: scorers give a number per position, selectors turn a step into a set.

All tensors are [slots, B]; only `masked` positions count. Larger scores go first, ties to the lowest position. A scorer that
looks at the state only (everything but `sampled_prob`, and EOSER's factor) makes the product of committed-token probabilities
the exact transition probability; see `Scorer.state_only`. Every selector commits at least one position of every slot that has
a masked one, and marks as forced what did not pass its test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlpipe.sampling.statistics import RowStatistics


class StepView(NamedTuple):
    """What a selector sees of a step. score float32, masked bool, statistics: [slots, B] · block_step int64 [slots]: steps that
    the active block has had · settled float32 [slots]: mean confidence of what the block has committed so far, NaN for nothing;
    only for selectors that ask for it (`uses_settled`)."""

    score: torch.Tensor
    masked: torch.Tensor
    statistics: RowStatistics
    block_step: torch.Tensor
    settled: torch.Tensor | None = None


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

Choice = tuple[torch.Tensor, torch.Tensor]


class Selector:
    """`select(view) → (commit, forced)`, bool [slots, B]."""

    uses_settled = False

    def __call__(self, view: StepView) -> Choice:
        raise NotImplementedError


def ranks(score: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """int64 [slots, B]: 0 for the best masked position; unmasked ones come last."""
    ordered = torch.where(masked, score, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return ordered.argsort(dim=-1)


def at_least(passed: torch.Tensor, view: StepView, quota: int = 1) -> Choice:
    """What passed a test; in slots where fewer than `quota` did, the best `quota` too, those that failed marked forced."""
    best = view.masked & (ranks(view.score, view.masked) < quota)
    short = passed.sum(-1, keepdim=True) < quota
    return torch.where(short, best | passed, passed), short & best & ~passed


def in_order(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`values` [slots, B] sorted so that rank 0 comes first; `order` are the ranks."""
    return torch.empty_like(values).scatter(1, order, values)


@dataclass(frozen=True)
class Static(Selector):
    """The best `quota` positions each step (LLaDA, SDAR low_confidence_static)."""

    quota: int = 1

    def progress(self, block_step: torch.Tensor, width: int) -> torch.Tensor:
        """i / (N - 1) for the i-th of N = ceil(width / quota) steps."""
        return block_step / max(1, -(-width // self.quota) - 1)

    def __call__(self, view: StepView) -> Choice:
        return view.masked & (ranks(view.score, view.masked) < self.quota), torch.zeros_like(view.masked)


@dataclass(frozen=True)
class Threshold(Selector):
    """Everything with a score of at least `threshold`; where fewer than `quota` pass, the best `quota`.

    Fast-dLLM (arXiv 2505.22618) with quota 1; SDAR's dynamic rule, which asks for more than the threshold.
    """

    threshold: float = 0.9
    quota: int = 1

    def __call__(self, view: StepView) -> Choice:
        return at_least(view.masked & (view.score >= self.threshold), view, self.quota)


@dataclass(frozen=True)
class Factor(Selector):
    """The longest run of best positions with (r + 1)·(1 - score) < factor for the r-th, counted from 1; the first is free.

    Fast-dLLM's factor rule as written down; its loop commits one more when the test fails only at the last rank.
    """

    factor: float = 1.0

    def __call__(self, view: StepView) -> Choice:
        order = ranks(view.score, view.masked)
        passes = ((order + 2) * (1 - view.score) < self.factor) & view.masked
        unbroken = in_order(passes.long(), order).cumprod(-1).gather(1, order).bool()
        return at_least(unbroken, view)


@dataclass(frozen=True)
class EntropyBounded(Selector):
    """The longest run of best positions whose entropies, without the largest of them, add up to at most `gamma` nats.

    EB-sampler (arXiv 2505.24857). With keep_largest the largest counts too, the SDAR form (its reference crashes).
    """

    gamma: float = 0.35
    keep_largest: bool = False

    def __call__(self, view: StepView) -> Choice:
        order = ranks(view.score, view.masked)
        entropy = in_order(torch.where(view.masked, view.statistics.entropy, float("inf")), order)
        spent = entropy.cumsum(-1) - (0 if self.keep_largest else entropy.cummax(-1).values)
        within = (spent <= self.gamma).gather(1, order) & view.masked  # inf - inf is NaN, and NaN is within nothing
        return at_least(within, view)


@dataclass(frozen=True)
class LocalLeap(Selector):
    """All above `anchor`, and within `radius` positions of such an anchor all above `relaxed` (arXiv 2510.07081)."""

    anchor: float = 0.9
    relaxed: float = 0.75
    radius: int = 4

    def __call__(self, view: StepView) -> Choice:
        anchors = view.masked & (view.score >= self.anchor)
        near = torch.nn.functional.max_pool1d(anchors.float().unsqueeze(1), 2 * self.radius + 1, 1, self.radius).squeeze(1) > 0
        return at_least(anchors | (near & view.masked & (view.score >= self.relaxed)), view)


@dataclass(frozen=True)
class Hierarchical(Selector):
    """The best position of every run of masks, if above `low`, and everything above `high` (dInfer)."""

    low: float = 0.4
    high: float = 0.9

    def __call__(self, view: StepView) -> Choice:
        masked, order = view.masked, ranks(view.score, view.masked)
        run = (masked & ~torch.nn.functional.pad(masked, (1, -1))).cumsum(
            -1
        )  # runs are counted from 1; 0 lies before the first
        best = torch.full_like(order, order.shape[1]).scatter_reduce(1, run.clamp_max(order.shape[1] - 1), order, "amin")
        first = masked & (order == best.gather(1, run.clamp_max(order.shape[1] - 1)))
        return at_least((first & (view.score > self.low)) | (masked & (view.score > self.high)), view)


@dataclass(frozen=True)
class BlockAdaptive(Selector):
    """Everything above a bar that follows the block: the mean confidence of what it has committed, kept in [low, high]; at
    first the best score (BACD, the TDAR decoder)."""

    low: float = 0.6
    high: float = 0.9
    uses_settled = True

    def __call__(self, view: StepView) -> Choice:
        best = torch.where(view.masked, view.score, float("-inf")).amax(-1)
        bar = torch.where(view.settled.isnan(), best, view.settled).clamp(self.low, self.high)
        return at_least(view.masked & (view.score >= bar.unsqueeze(-1)), view)


@dataclass(frozen=True)
class Doubling(Selector):
    """1, 2, 4, … positions, and all that are left in step floor(log2 L), L being the block's size (ASS, arXiv 2509.23924)."""

    def progress(self, block_step: torch.Tensor, width: int) -> torch.Tensor:
        """Share of the block that is committed after the step: (2^(i+1) - 1) / 2^S."""
        steps = max(1, width.bit_length() - 1)
        return (2.0 ** (block_step + 1) - 1) / 2**steps

    def __call__(self, view: StepView) -> Choice:
        last = max(1, view.masked.shape[1].bit_length() - 1) - 1
        quota = torch.where(view.block_step < last, 2**view.block_step, view.masked.shape[1])
        chosen = view.masked & (ranks(view.score, view.masked) < quota.unsqueeze(-1))
        return chosen, torch.zeros_like(chosen)


SELECTORS: dict[str, type[Selector]] = {
    "static": Static,
    "threshold": Threshold,
    "factor": Factor,
    "entropy_bounded": EntropyBounded,
    "local_leap": LocalLeap,
    "hierarchical": Hierarchical,
    "block_adaptive": BlockAdaptive,
    "doubling": Doubling,
}
