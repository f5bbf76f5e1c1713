"""Selectors turn a step into the set of positions to commit.

`select(view) → (commit, forced)`, bool [slots, B]; forced marks what did not pass the selector's test and was taken all the
same so that the step makes progress. Every selector commits at least one position of every slot that has a masked one, but
`bernoulli`, which is bounded by its last step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlpipe.sampling.scoring import StepView, best, in_order, ranks

Choice = tuple[torch.Tensor, torch.Tensor]


class Selector:
    """uses: extras of the view it looks at (settled, stable, noise) · needs: row statistics it looks at (p_second, entropy) ·
    skips_idle_steps: steps for which the schedule has nothing may be passed over."""

    uses: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset()
    skips_idle_steps: ClassVar[bool] = True

    def __call__(self, view: StepView) -> Choice:
        raise NotImplementedError


def at_least(passed: torch.Tensor, view: StepView, count: torch.Tensor | int = 1, enough: torch.Tensor | int = 1) -> Choice:
    """What passed a test; in slots where fewer than `enough` did, the best `count` too, those that failed marked forced."""
    fallback = best(view, count)
    short = (passed.sum(-1) < enough).unsqueeze(-1)
    return torch.where(short, fallback | passed, passed), short & fallback & ~passed


def unforced(chosen: torch.Tensor) -> Choice:
    return chosen, torch.zeros_like(chosen)


@dataclass(frozen=True)
class Static(Selector):
    """The best of what the schedule commits (LLaDA, SDAR low_confidence_static, Dream maskgit_plus)."""

    def __call__(self, view: StepView) -> Choice:
        return unforced(best(view, view.quota.clamp_min(1)))


@dataclass(frozen=True)
class Everything(Selector):
    """All masked positions; for editors that take some of them back."""

    skips_idle_steps: ClassVar[bool] = False

    def __call__(self, view: StepView) -> Choice:
        return unforced(view.masked)


@dataclass(frozen=True)
class Threshold(Selector):
    """Everything with a score of at least `threshold`; where fewer than `enough` pass, the best the schedule commits.

    Fast-dLLM (arXiv 2505.22618): one position a step, enough 1. SDAR's dynamic rule: enough 0, which stands for the schedule's
    share, so that a step never commits less than the static rule. Dimple: enough 1, Dream's schedule.
    """

    threshold: float = 0.9
    enough: int = 0

    def __call__(self, view: StepView) -> Choice:
        quota = view.quota.clamp_min(1)
        return at_least(view.masked & (view.score >= self.threshold), view, quota, self.enough or quota)


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
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

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
        opens = masked & ~torch.nn.functional.pad(masked, (1, -1))
        run = opens.cumsum(-1).clamp_max(order.shape[1] - 1)  # runs are counted from 1; 0 lies before the first
        best_of_run = torch.full_like(order, order.shape[1]).scatter_reduce(1, run, order.where(masked, order.shape[1]), "amin")
        first = masked & (order == best_of_run.gather(1, run))
        return at_least((first & (view.score > self.low)) | (masked & (view.score > self.high)), view)


@dataclass(frozen=True)
class BlockAdaptive(Selector):
    """Everything above a bar that follows the block: the mean confidence of what it has committed, kept in [low, high]; at
    first the best score (BACD, the TDAR decoder)."""

    low: float = 0.6
    high: float = 0.9
    uses: ClassVar[frozenset[str]] = frozenset({"settled"})

    def __call__(self, view: StepView) -> Choice:
        top = torch.where(view.masked, view.score, float("-inf")).amax(-1)
        bar = torch.where(view.settled.isnan(), top, view.settled).clamp(self.low, self.high)
        return at_least(view.masked & (view.score >= bar.unsqueeze(-1)), view)


@dataclass(frozen=True)
class Bernoulli(Selector):
    """Every mask on its own with the schedule's probability 1 - t_{i+1} / t_i; the last step commits the rest (Dream's
    `origin`). The choice depends on nothing that is learned, so token probabilities are all there is to the likelihood."""

    uses: ClassVar[frozenset[str]] = frozenset({"noise"})
    skips_idle_steps: ClassVar[bool] = False

    def __call__(self, view: StepView) -> Choice:
        return unforced(view.masked & (view.noise < view.schedule.share(view.time).unsqueeze(-1)))


@dataclass(frozen=True)
class Prophet(Selector):
    """All masks at once as soon as the model is sure of the answer, otherwise the best the schedule commits (Prophet, early
    commit). Sure: the mean gap between the two largest logits over the `answer_len` positions from `answer_from` of the active
    block (counted from its end if negative) reaches early / middle / late, by thirds of the block's steps.

    The reference finds the answer behind an anchor text that it writes into the canvas (our structure priors) and measures
    all of the window; ours leaves out what is committed, and with several blocks looks at and fills the active one.
    """

    answer_from: int = -5
    answer_len: int = 5
    early: float = 7.5
    middle: float = 5.0
    late: float = 2.5
    needs: ClassVar[frozenset[str]] = frozenset({"p_second"})

    def __call__(self, view: StepView) -> Choice:
        width = view.masked.shape[1]
        column = torch.arange(width, device=view.masked.device)
        start = self.answer_from if self.answer_from >= 0 else view.length.unsqueeze(-1) + self.answer_from
        window = view.masked & (column >= start) & (column < start + self.answer_len)
        gap = (view.statistics.p_max / view.statistics.p_second.clamp_min(1e-30)).clamp_min(1e-30).log()
        mean = torch.where(window, gap, 0.0).sum(-1) / window.sum(-1).clamp_min(1)
        done = view.time / view.schedule.total(view.opened)
        bar = torch.where(done < 1 / 3, self.early, torch.where(done < 2 / 3, self.middle, self.late))
        sure = (mean >= bar) & window.any(-1)
        return unforced(torch.where(sure.unsqueeze(-1), view.masked, best(view, view.quota.clamp_min(1))))


@dataclass(frozen=True)
class Stable(Selector):
    """Confident and settled: a score above `threshold` and, over the last `steps_stable` steps, a KL divergence to the step
    before below `kl`; where nothing is, the best the schedule commits (KLASS)."""

    threshold: float = 0.9
    kl: float = 0.01
    steps_stable: int = 2
    uses: ClassVar[frozenset[str]] = frozenset({"stable"})

    def __call__(self, view: StepView) -> Choice:
        passed = view.masked & (view.score > self.threshold) & (view.stable >= self.steps_stable)
        return at_least(passed, view, view.quota.clamp_min(1))


@dataclass(frozen=True)
class WideIn(Selector):
    """Everything above `wide`, at most min(max(share · masks, 5), most) of the best, at least one: the first half of WINO."""

    wide: float = 0.6
    share: float = 0.7
    most: int = 20

    def __call__(self, view: StepView) -> Choice:
        masks = view.masked.sum(-1)
        cap = (masks * self.share).long().clamp_min(5).clamp_max(self.most)
        return at_least(best(view, cap) & (view.score > self.wide), view)


SELECTORS: dict[str, type[Selector]] = {
    "static": Static,
    "threshold": Threshold,
    "factor": Factor,
    "entropy_bounded": EntropyBounded,
    "local_leap": LocalLeap,
    "hierarchical": Hierarchical,
    "block_adaptive": BlockAdaptive,
    "bernoulli": Bernoulli,
    "prophet": Prophet,
    "stable": Stable,
}
