"""Editors take committed tokens back. They bring their own selector, and leave an event log instead of a step map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from rlpipe.errors import ConfigError
from rlpipe.sampling.schedule import Schedule
from rlpipe.sampling.scoring import StepView, ranks
from rlpipe.sampling.selection import Everything, Selector, WideIn, unforced


class EditView(NamedTuple):
    """What an editor sees after the step's commits; [slots, B] over its window. decoded bool: holds a sampled token · fresh
    bool: committed in this step · confidence float32: the score each token had when it was last decoded · shadow float32:
    probability of each token when the model does not see it, NaN where it was not asked · noise float64 uniforms · left,
    accepted_before, time, opened int64 [slots]: masks that the schedule wants to remain, commits of the step before, the step,
    masks when the block was opened · schedule."""

    decoded: torch.Tensor
    fresh: torch.Tensor
    confidence: torch.Tensor
    shadow: torch.Tensor | None
    noise: torch.Tensor
    left: torch.Tensor
    accepted_before: torch.Tensor
    time: torch.Tensor
    opened: torch.Tensor
    schedule: Schedule


class Editor:
    """scope: 'block', or 'sequence': earlier blocks can be opened again · uses_shadow: committed tokens are predicted again
    without being seen."""

    scope: str = "block"
    uses_shadow: ClassVar[bool] = False

    def selector(self) -> Selector:
        raise NotImplementedError

    def remask(self, view: EditView) -> torch.Tensor:
        """bool [slots, B]: tokens to take back."""
        raise NotImplementedError


@dataclass(frozen=True)
class RunningConfidence(Editor):
    """RCR (MDPO, arXiv 2508.13148): decode every mask of the block, then take the least certain back until as many are masked
    as the schedule wants. A token keeps the confidence of its last decode. scope sequence as published (tokens of earlier
    blocks can go too), block for models with a block cache. The reference lets saturated confidences tie with prompt tokens
    and may re-mask those; here only sampled tokens can be taken back.
    """

    scope: str = "sequence"

    def __post_init__(self) -> None:
        if self.scope not in ("sequence", "block"):
            raise ConfigError(f"decoder.options.scope={self.scope}: rcr re-masks in the whole 'sequence' or in the 'block'")

    def selector(self) -> Selector:
        return Everything()

    def remask(self, view: EditView) -> torch.Tensor:
        return view.decoded & (ranks(-view.confidence, view.decoded) < view.left.unsqueeze(-1))


@dataclass(frozen=True)
class WideInNarrowOut(Editor):
    """WINO: commit widely, then take back tokens that the model, not seeing them, gives less than `back`; the least certain
    first, fewer than the step before had committed, so that every block ends."""

    wide: float = 0.6
    share: float = 0.7
    most: int = 20
    back: float = 0.9
    uses_shadow: ClassVar[bool] = True

    def selector(self) -> Selector:
        return WideIn(self.wide, self.share, self.most)

    def remask(self, view: EditView) -> torch.Tensor:
        doubtful = view.decoded & ~view.fresh & (view.shadow < self.back)  # NaN is below nothing
        return doubtful & (ranks(-view.shadow, doubtful) < (view.accepted_before - 1).unsqueeze(-1))


@dataclass(frozen=True)
class ReMDM(Editor):
    """Ancestral steps that re-mask with probability σ (ReMDM, arXiv 2503.00307), with α = 1 - t and Dream's time grid.

    strategy cap: σ = min(eta, (1 - α_s) / α_t) · rescale: eta · σ_max with σ_max = min(1, (1 - α_s) / α_t) · conf: σ_max shared
    out by softmax(-confidence at the last decode) · loop: cap while t is in (off, on), during which α stays at 1 - on.
    """

    strategy: str = "cap"
    eta: float = 0.02
    on: float = 0.55
    off: float = 0.05

    def __post_init__(self) -> None:
        if self.strategy not in ("cap", "rescale", "conf", "loop"):
            raise ConfigError(f"decoder.options.strategy={self.strategy}: remdm knows cap, rescale, conf and loop")
        if not 0 <= self.off < self.on <= 1:
            raise ConfigError(f"decoder.options: remdm needs 0 <= off < on <= 1, not off={self.off}, on={self.on}")

    def selector(self) -> Selector:
        return Ancestral(self)

    def rates(self, schedule: Schedule, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 [slots] each: σ_max of this step (before `conf` shares it out), probability that a mask is committed."""
        before, after = schedule.noise_level(time)
        looping = (before <= self.on) & (before > self.off) if self.strategy == "loop" else torch.zeros_like(before, dtype=bool)
        if self.strategy == "loop":  # alpha is held from `on` to `off`, and hurries from there to 1
            held = lambda t: torch.where(t > self.on, t, torch.where(t > self.off, self.on, t * self.on / max(self.off, 1e-9)))  # noqa: E731
            before, after = held(before), held(after)
        alpha, alpha_next = 1 - before, 1 - after
        most = ((1 - alpha_next) / alpha.clamp_min(1e-12)).clamp_max(1.0)
        sigma = {"cap": most.clamp_max(self.eta), "rescale": self.eta * most, "conf": most}.get(self.strategy)
        if sigma is None:
            sigma = torch.where(looping, most.clamp_max(self.eta), 0.0)
        kept = 0.0 if self.strategy == "conf" else sigma  # conf: a mask has no confidence, so its own sigma is 0
        commit = ((alpha_next - (1 - kept) * alpha) / (1 - alpha).clamp_min(1e-12)).clamp(0.0, 1.0)
        return sigma, commit

    def remask(self, view: EditView) -> torch.Tensor:
        sigma, _ = self.rates(view.schedule, view.time)
        old = view.decoded & ~view.fresh
        sigma = sigma.unsqueeze(-1)
        if self.strategy == "conf":
            sigma = sigma * torch.softmax(torch.where(old, -view.confidence.double(), float("-inf")), -1).nan_to_num()
        last = view.schedule.last(view.opened, view.time).unsqueeze(-1)
        return old & (view.noise < sigma) & ~last


@dataclass(frozen=True)
class Ancestral(Selector):
    """The commits of a ReMDM step: every mask on its own, all of them at the last step."""

    editor: ReMDM
    uses: ClassVar[frozenset[str]] = frozenset({"noise"})
    skips_idle_steps: ClassVar[bool] = False

    def __call__(self, view: StepView):
        _, commit = self.editor.rates(view.schedule, view.time)
        last = view.schedule.last(view.opened, view.time)
        return unforced(view.masked & ((view.noise < commit.unsqueeze(-1)) | last.unsqueeze(-1)))


EDITORS: dict[str, type[Editor]] = {"rcr": RunningConfidence, "wino": WideInNarrowOut, "remdm": ReMDM}
