"""The samples of a step on one rank, and their micro-batches as packed tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlpipe.learner.samples import Sample
from rlpipe.models.packing import PackedBatch, make_piece, pack
from rlpipe.models.spec import DiffusionSpec
from rlpipe.objectives.entries import Entries


class Batches:
    """Micro-batches are lists of sample indices; ~i stands for sample i as a filler (see `micro_batches.Shard`)."""

    def __init__(self, samples: Sequence[Sample], spec: DiffusionSpec, device: torch.device):
        self.samples, self.device = list(samples), device
        self.pieces = [
            make_piece(
                sample.prompt_ids,
                sample.response_ids,
                sample.masked,
                sample.scored,
                block_size=sample.block_size,
                mask_id=spec.mask_token_id,
                logit_shift=spec.logit_shift,
                targets=sample.targets if sample.targets.size else None,
            )
            for sample in self.samples
        ]

    def packed(self, batch: Sequence[int]) -> PackedBatch:
        """`slot` of the result orders its scored tokens sample after sample, row-major."""
        indices = [max(i, ~i) for i in batch]
        starts = np.cumsum([0] + [self.samples[i].num_scored for i in indices])
        slots = [self.pieces[i].slot + start for i, start in zip(indices, starts[:-1], strict=True)]
        groups = [self.samples[i].group for i in indices]
        return pack([self.pieces[i] for i in indices], slots, groups).to(self.device)

    def column(self, batch: Sequence[int], name: str) -> torch.Tensor:
        """One of the samples' float columns, joined."""
        return torch.from_numpy(np.concatenate([getattr(self.samples[i], name) for i in batch])).to(self.device)

    def entries(self, batch: Sequence[int], positions: bool = False) -> Entries:
        """How the batch's scored tokens join into units, and what each unit weighs. positions: with their places, which only
        joins that are not sums need."""
        held = [self.samples[i] for i in batch]
        unit = coefficient = None
        if any(len(sample.unit) for sample in held):
            starts = np.cumsum([0] + [len(sample.advantage) for sample in held])
            own = [sample.unit if len(sample.unit) else np.arange(sample.num_scored) for sample in held]
            unit = self._ids([part + start for part, start in zip(own, starts[:-1], strict=True)])
            ones = [s.coefficient if len(s.unit) else np.ones(s.num_scored, np.float32) for s in held]
            coefficient = torch.from_numpy(np.concatenate(ones)).to(self.device)
        return Entries(
            unit=unit,
            coefficient=coefficient,
            advantage=self.column(batch, "advantage"),
            policy_weight=self.column(batch, "policy_weight"),
            kl_weight=self.column(batch, "kl_weight"),
            position=self._ids(_positions(held)) if positions else None,
        )

    def behaviour(self, batch: Sequence[int]) -> torch.Tensor:
        """float32 [M]: what the sampler recorded where it drew from another distribution than that of the policy which opens
        the step; NaN where it is the same, or where the row shows another state than the sampler's, so nothing is known."""
        held = [self.samples[i] for i in batch]
        found = [np.where(s.on_policy, np.float32("nan"), s.rollout_logp) for s in held]
        return torch.from_numpy(np.concatenate(found)).to(self.device)

    def off_policy(self, batch: Sequence[int]) -> dict[str, float]:
        """Sums over the batch's scored tokens: stale_tokens, drawn by other weights than those that open the step, and
        uncorrected_tokens, which another distribution drew and no recorded log-probability can weigh. Empty if all are the
        policy's own."""
        held = [self.samples[i] for i in batch]
        if all(s.on_policy.all() for s in held):
            return {}
        return {
            "stale_tokens": float(sum(np.count_nonzero(s.lag) for s in held)),
            "uncorrected_tokens": float(sum(np.count_nonzero(~s.on_policy & np.isnan(s.rollout_logp)) for s in held)),
        }

    def _ids(self, parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(self.device)


def _positions(samples: Sequence[Sample]) -> list[np.ndarray]:
    """Response position of every scored token, numbered through over the samples."""
    starts = np.cumsum([0] + [sample.scored.shape[1] for sample in samples])
    return [np.nonzero(sample.scored)[1] + start for sample, start in zip(samples, starts[:-1], strict=True)]


def is_filler(batch: Sequence[int]) -> bool:
    return batch[0] < 0
