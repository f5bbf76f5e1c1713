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
        logp = _float(logp)
        if self.unit is None:
            return logp
        if self.coefficient is not None:
            logp = logp * self.coefficient
        return self._total(logp)

    def log_importance(self, old_logp: torch.Tensor, behaviour_logp: torch.Tensor) -> torch.Tensor:
        """log of p_old / p_behaviour of each unit [U]: Σ (old_logp - behaviour_logp) over those of its entries [M] that another
        distribution drew, the others adding nothing; NaN for a unit without any (behaviour_logp is NaN in all its entries).

        Coefficients play no part: they say what is clipped as one, while the ratio of two distributions of the same tokens is
        the product of the tokens' ratios. With anything else, whole responses would not be weighed to the policy's own
        expectation.
        """
        gap = _float(old_logp) - _float(behaviour_logp)
        if self.unit is None:
            return gap
        known = ~gap.isnan()
        total = self._total(torch.where(known, gap, 0.0))
        return total.masked_fill(self._total(known.to(gap.dtype)) == 0, torch.nan)

    def _total(self, values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(len(self.advantage)).index_add(0, self.unit, values)


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
