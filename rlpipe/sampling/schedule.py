"""How many positions each step of a block commits.

Everything is int64 [slots]: `opened` masks when the block was opened, `masked` masks now, `time` the 0-based step of the
schedule. A selector may commit more (thresholds) or decide otherwise; the schedule is what it falls back on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from rlpipe.errors import ConfigError

Count = torch.Tensor


class Schedule:
    def left(self, opened: Count, time: Count) -> Count:
        """Masks that remain after step `time` if every step commits its share."""
        raise NotImplementedError

    def total(self, opened: Count) -> Count:
        """Steps of a block."""
        raise NotImplementedError

    def commits(self, opened: Count, masked: Count, time: Count) -> Count:
        """Positions to commit at step `time`; 0 is possible."""
        return torch.where(time > 0, self.left(opened, time - 1), opened) - self.left(opened, time)

    def useful(self, masked: Count, time: Count) -> Count:
        """The first step from `time` on that commits anything; the forwards in between would change nothing."""
        return time

    def progress(self, opened: Count, time: Count) -> torch.Tensor:
        """float32 [slots] in [0, 1]: 0 at the first step, 1 at the last (EOSER's clock)."""
        return (time / (self.total(opened) - 1).clamp_min(1)).clamp_max(1.0)

    def last(self, opened: Count, time: Count) -> torch.Tensor:
        """bool [slots]: whatever is masked must be committed now."""
        return time >= self.total(opened) - 1


@dataclass(frozen=True)
class PerStep(Schedule):
    """`tokens_per_step` each step."""

    tokens_per_step: int = 1

    def left(self, opened, time):
        return (opened - self.tokens_per_step * (time + 1)).clamp_min(0)

    def total(self, opened):
        return -(-opened // self.tokens_per_step)

    def commits(self, opened, masked, time):
        return torch.full_like(time, self.tokens_per_step)


@dataclass(frozen=True)
class Even(Schedule):
    """`steps` steps of equal size, the remainder on the first ones (LLaDA, arXiv 2502.09992). Where a block has fewer masks
    than steps the reference goes on forwarding a finished block; we stop."""

    steps: int = 8

    def left(self, opened, time):
        done = (time + 1).clamp_max(self.steps)
        return opened - opened // self.steps * done - torch.minimum(done, opened % self.steps)

    def total(self, opened):
        return torch.full_like(opened, self.steps)


@dataclass(frozen=True)
class MaskGit(Schedule):
    """floor(N · γ((i + 1) / steps)) masks are left after step i; γ(x): linear 1 - x · cosine cos(πx/2) · pow 1 - x^power ·
    log -log2 x / log2 N · exp 1 - 2^(-log2 N · (1 - x)). As in MDPO's sampler, in double
    precision."""

    curve: str = "cosine"
    steps: int = 8
    power: float = 2.0

    def left(self, opened, time):
        x = ((time + 1).double() / self.steps).clamp_max(1.0)
        bits = opened.clamp_min(2).double().log2()
        gamma = {
            "linear": lambda: 1 - x,
            "cosine": lambda: torch.cos(x * math.pi / 2),
            "pow": lambda: 1 - x**self.power,
            "log": lambda: -x.log2() / bits,
            "exp": lambda: 1 - torch.exp2(-bits * (1 - x)),
        }[self.curve]()
        return (opened * gamma.clamp(1e-6, 1.0)).floor().long()

    def total(self, opened):
        return torch.full_like(opened, self.steps)


@dataclass(frozen=True)
class TimeGrid(Schedule):
    """Dream's: times from 1 down to `epsilon`; step i commits int(masked · (1 - t_{i+1} / t_i)), the last one the rest.

    Early steps round to 0 tokens; we go straight to the first that does not, which leaves out forwards whose result would be
    thrown away. The reference takes the mean mask count of the batch where we take the request's own.
    """

    steps: int = 128
    epsilon: float = 1e-3

    def share(self, time: Count) -> torch.Tensor:
        """float64: 1 - t_{i+1} / t_i, and 1 at the last step."""
        grid = torch.linspace(1, self.epsilon, self.steps + 1, dtype=torch.float64, device=time.device)
        share = 1 - grid[1:] / grid[:-1]
        share[-1] = 1.0
        return share[time.clamp_max(self.steps - 1)]

    def noise_level(self, time: Count) -> tuple[torch.Tensor, torch.Tensor]:
        """(t before the step, t after it), float64."""
        grid = torch.linspace(1, self.epsilon, self.steps + 1, dtype=torch.float64, device=time.device)
        grid[-1] = 0.0
        time = time.clamp_max(self.steps - 1)
        return grid[time], grid[time + 1]

    def left(self, opened, time):
        return (opened * self.noise_level(time)[1]).long()

    def total(self, opened):
        return torch.full_like(opened, self.steps)

    def commits(self, opened, masked, time):
        return (masked * self.share(time)).long()

    def useful(self, masked, time):
        later = torch.arange(self.steps, device=time.device)
        counts = (masked.unsqueeze(1) * self.share(later)).long()
        fits = (later >= time.unsqueeze(1)) & ((counts > 0) | (later == self.steps - 1))
        return torch.where(time < self.steps, fits.int().argmax(1), time)


@dataclass(frozen=True)
class Doubling(Schedule):
    """1, 2, 4, … positions, and all that are left in step floor(log2 N) (ASS, arXiv 2509.23924)."""

    @staticmethod
    def exponent(opened: Count) -> Count:
        return torch.frexp(opened.double())[1].long() - 1  # floor(log2), exactly

    def left(self, opened, time):
        rest = opened - 2 ** (time + 1) + 1
        return torch.where(self.last(opened, time), 0, rest.clamp_min(0))

    def total(self, opened):
        return self.exponent(opened).clamp_min(1)

    def progress(self, opened, time):
        """Share of the block committed after the step, (2^(i+1) - 1) / 2^S: EOSER's clock under ASS."""
        return ((2.0 ** (time + 1) - 1) / 2.0 ** self.total(opened)).float().clamp_max(1.0)


CURVES = ("linear", "cosine", "pow", "log", "exp")
SCHEDULES = ("tokens", "even", "dream", "doubling", *CURVES)


def schedule_kind(name: str) -> tuple[type[Schedule], dict[str, Any]]:
    """(class, numbers that the name fixes). Raises ConfigError for an unknown name."""
    if name in CURVES:
        return MaskGit, {"curve": name}
    kinds = {"tokens": PerStep, "even": Even, "dream": TimeGrid, "doubling": Doubling}
    if name not in kinds:
        raise ConfigError(f"decoder.schedule={name}: known schedules are {', '.join(SCHEDULES)}")
    return kinds[name], {}
