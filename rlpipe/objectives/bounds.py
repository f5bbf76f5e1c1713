"""Joins that are not sums: a bound of a response's log-likelihood chosen by the sign of its advantage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlpipe.errors import ConfigError
from rlpipe.objectives.entries import Entries


@dataclass(frozen=True, slots=True)
class Sandwich:
    """What is raised is a lower bound of log p, what is lowered leans on an upper one (SPG, arXiv 2510.09541).

    With rows n = 1 … N that score k_n tokens of a response each, and coefficients 1 / (N·k_n):

        lower = Σ_n mean over its tokens of log p / N
        upper = mean over positions i of log(Σ_n p_ni^beta · P / (N·k_n)) / beta

    P is the number of scored positions; the inner sum runs over the rows that mask i. A >= 0: lower; A < 0: mix·upper +
    (1 - mix)·lower. The published code has the response's length for P, a constant without gradient that is the same as soon as
    every token is masked once.
    """

    beta: float = 1.5
    mix: float = 0.5

    def __post_init__(self) -> None:
        if not self.beta > 0 or not 0 <= self.mix <= 1:
            raise ConfigError(f"algo.options.beta={self.beta} must be above 0, algo.options.mix={self.mix} between 0 and 1")

    def join(self, logp: torch.Tensor, entries: Entries) -> torch.Tensor:
        """logp [M] → the bound of each unit [U]; its units are whole responses."""
        lower = entries.join(logp)
        logp = logp.to(lower.dtype)
        unit = torch.arange(len(logp), device=logp.device) if entries.unit is None else entries.unit
        _, place = torch.unique(entries.position, return_inverse=True)
        count = int(place.max()) + 1 if len(place) else 0
        scaled = self.beta * logp
        if entries.unit is not None and entries.coefficient is not None:
            scaled = scaled + entries.coefficient.to(logp.dtype).log()
        level = scaled.detach().new_full((count,), -math.inf).scatter_reduce(0, place, scaled.detach(), "amax")
        total = scaled.new_zeros(count).index_add(0, place, (scaled - level[place]).exp()).log() + level
        owner = unit.new_zeros(count).scatter(0, place, unit)
        positions = torch.bincount(owner, minlength=len(lower)).clamp(min=1).to(lower.dtype)
        upper = (lower.new_zeros(len(lower)).index_add(0, owner, total) / positions + positions.log()) / self.beta
        return torch.where(entries.advantage >= 0, lower, self.mix * upper + (1.0 - self.mix) * lower)
