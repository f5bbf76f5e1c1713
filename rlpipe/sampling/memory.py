"""What some decoders remember of earlier steps, a row of the vocabulary for every position of the active block.

A memory is part of a request's state: it starts empty with the block and moves with its slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class BlockMemory:
    """float32 [slots, B, V], grown when first needed."""

    def __init__(self) -> None:
        self.values: torch.Tensor | None = None

    def rows(self, slots: int, width: int, logits: torch.Tensor) -> torch.Tensor:
        shape = (slots, width, logits.shape[1])
        if self.values is None:
            self.values = torch.zeros(shape, device=logits.device)
        elif self.values.shape[1] < width:
            more = torch.zeros((slots, width - self.values.shape[1], shape[2]), device=logits.device)
            self.values = torch.cat([self.values, more], 1)
        return self.values

    def reset(self, slots: torch.Tensor) -> None:
        """slots bool [n]: those that open a new block."""
        if self.values is not None:
            self.values[slots] = 0

    def keep(self, slots: torch.Tensor) -> None:
        if self.values is not None:
            self.values = self.values[slots]


@dataclass(frozen=True)
class Credit:
    """CreditDecoding's fusion (as in dInfer): tokens that were on top in earlier steps get credit.

    Every step a position's credits decay by `credit_decay` and its most likely token gains p^credit_power; the token is then
    drawn from logits + credit_weight · log(1 + credit). The recorded log-probability is that of the fused distribution, which
    needs the whole history: a learner that shows the state alone cannot reproduce it, so samples are flagged inexact.
    """

    credit_weight: float = 0.7
    credit_decay: float = 0.8
    credit_power: float = 0.2

    def fuse(self, memory: BlockMemory, logits: torch.Tensor, slot: torch.Tensor, column: torch.Tensor, shape) -> torch.Tensor:
        """logits float32 [M, V] of positions (slot, column) of the active blocks, shape (slots, B) → fused logits."""
        state = memory.rows(*shape, logits)
        top = logits.max(-1)
        gain = (top.values - logits.logsumexp(-1)).exp() ** self.credit_power
        credit = state[slot, column] * self.credit_decay
        credit.scatter_add_(1, top.indices.unsqueeze(1), gain.unsqueeze(1))
        state[slot, column] = credit
        return logits + self.credit_weight * credit.log1p()


class Stability:
    """How long each position's distribution has hardly moved: KL(p_t ‖ p_{t-1}) below `kl` nats (KLASS)."""

    def __init__(self, kl: float):
        self.kl = kl
        self.previous, self.count = BlockMemory(), None

    def observe(self, logits: torch.Tensor, slot: torch.Tensor, column: torch.Tensor, shape: tuple[int, int]) -> None:
        """logits float32 [M, V] of positions (slot, column) of the active blocks, shape (slots, B)."""
        before = self.previous.rows(*shape, logits)
        if self.count is None or self.count.shape[1] < before.shape[1]:
            fresh = torch.full(before.shape[:2], -1, dtype=torch.int64, device=logits.device)  # -1: never seen
            if self.count is not None:
                fresh[:, : self.count.shape[1]] = self.count
            self.count = fresh
        logp = torch.log_softmax(logits, -1)
        moved = (logp.exp() * (logp - before[slot, column]).nan_to_num(nan=0.0)).sum(-1)  # -inf - -inf: forbidden ids
        seen = self.count[slot, column]
        self.count[slot, column] = torch.where((seen >= 0) & (moved < self.kl), seen + 1, 0)
        before[slot, column] = logp

    def steps(self, width: int) -> torch.Tensor:
        """int64 [slots, B]."""
        return self.count[:, :width].clamp_min(0)

    def reset(self, slots: torch.Tensor) -> None:
        if self.count is not None:
            self.count[slots] = -1

    def keep(self, slots: torch.Tensor) -> None:
        self.previous.keep(slots)
        if self.count is not None:
            self.count = self.count[slots]
