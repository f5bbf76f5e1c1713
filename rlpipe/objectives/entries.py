"""The scored log-probabilities of a micro-batch, and the units of the ratio that they join."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """M scored log-probabilities in U units, of any number of whole units.

    unit int64[M]: the unit that each entry joins, or None: each is its own unit, with coefficient 1 · coefficient float32[M] of
    each in its unit's sum, or None for 1 · advantage, policy_weight, kl_weight float32[U] (reducer weights; their sums over an
    update are its loss) · position int64[M]: id of the response position, unique over the micro-batch, for joins that are not
    sums; else None.
    """

    unit: torch.Tensor | None
    coefficient: torch.Tensor | None
    advantage: torch.Tensor
    policy_weight: torch.Tensor
    kl_weight: torch.Tensor
    position: torch.Tensor | None = None

    def join(self, logp: torch.Tensor) -> torch.Tensor:
        """logp [M] → Σ coefficient · logp of each unit [U], in float32 at least. NaN in any entry makes its unit NaN."""
        logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
        if self.unit is None:
            return logp
        if self.coefficient is not None:
            logp = logp * self.coefficient
        return logp.new_zeros(len(self.advantage)).index_add(0, self.unit, logp)
