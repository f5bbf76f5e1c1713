"""One attention function for every model: the caller passes a plan, the stock modelling code calls it.

`transformers` lets an attention implementation be registered by name and hands unknown keyword arguments of the model
call down to it. So `model(input_ids, position_ids, plan=plan)` runs stock Qwen3 or Llama code with our visibility rule and
our cache, the same in rollout, learner and evaluation; that is what makes their log-probabilities agree.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

IMPLEMENTATION = "rlpipe"


class AttentionPlan(Protocol):
    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query [N, H, T, D], key and value [N, Hkv, T, D] after rotary embedding → [N, T, H, D]."""
        ...


def planned_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    plan: AttentionPlan,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    return plan.attend(module.layer_idx, query, key, value, scaling), None


def register() -> None:
    """Make `attn_implementation="rlpipe"` known to transformers; harmless when repeated.

    No mask function is registered on purpose: transformers then builds no mask of its own.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, planned_attention)


def visible(block: torch.Tensor, copy: torch.Tensor, sequence: torch.Tensor | None = None) -> torch.Tensor:
    """The one visibility rule of packed rows: bool [N, T, T], True where query i may see key j.

    block int[N, T]: block id on the absolute grid · copy int[N, T]: 0 for clean tokens, an id of its own for each noisy
    segment (one block of one noisy row), -1 for padding · sequence int[N, T]: tells packed sequences apart.

    Clean queries see clean keys of their own and earlier blocks; noisy queries see clean keys of earlier blocks and their
    own segment. Full attention is the case of a single block. Padding sees itself only, so that no softmax row is empty.
    Block form as in TraceRL (arXiv 2509.06949) and BD3-LM, but on the absolute grid and with every noisy row in one pass.
    """
    block_q, block_k = block.unsqueeze(-1), block.unsqueeze(-2)
    copy_q, copy_k = copy.unsqueeze(-1), copy.unsqueeze(-2)
    clean_key = copy_k == 0
    from_clean = (copy_q == 0) & clean_key & (block_k <= block_q)
    from_noisy = (copy_q > 0) & ((clean_key & (block_k < block_q)) | (copy_k == copy_q))
    allowed = from_clean | from_noisy
    if sequence is not None:
        allowed = allowed & (sequence.unsqueeze(-1) == sequence.unsqueeze(-2))
    itself = torch.eye(block.shape[-1], dtype=torch.bool, device=block.device)
    return allowed | (itself & (copy_q < 0))


class DensePlan:
    """Every row sees what `mask` says: bool [N, T, T], True is visible. The learner's CPU path."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask.unsqueeze(1)

    def attend(self, layer, query, key, value, scaling):
        return _sdpa(query, key, value, self.mask, scaling)


class SlotCache:
    """Key and value storage of the rollout: one slot a request, every position of its canvas.

    Rows of a step are packed: T rows of n slots in one sequence. They write their keys and values at (slot, position) and
    then see all positions of their slot below their own `key_len`. All rows of a step are written before any attends, so a
    clean block and the masked block behind it can share a forward (the fused commit) and the clean one never sees the other.
    """

    def __init__(self, *, slots: int, positions: int, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device):
        shape = (slots, positions, kv_heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def keep(self, slots: torch.Tensor) -> None:
        """Compact to the given slots, in that order, when requests finish."""
        self.keys = [k[slots] for k in self.keys]
        self.values = [v[slots] for v in self.values]

    def plan(self, slot: torch.Tensor, position: torch.Tensor, key_len: torch.Tensor, num_slots: int) -> SlotPlan:
        """slot, position, key_len: int64 [T], rows grouped by slot in ascending order."""
        return SlotPlan(self, slot, position, key_len, num_slots)


class SlotPlan:
    """One step over a `SlotCache`; see there."""

    def __init__(self, cache: SlotCache, slot, position, key_len, num_slots: int):
        self.cache, self.slot, self.position = cache, slot, position
        counts = torch.bincount(slot, minlength=num_slots)
        width = int(counts.max())
        start = counts.cumsum(0) - counts
        inside = torch.arange(width, device=slot.device)
        # Slots with fewer rows repeat their first row as filler: valid attention, thrown away afterwards.
        self.gather = start.unsqueeze(1) + torch.where(inside < counts.unsqueeze(1), inside, 0)
        self.back = slot * width + (torch.arange(len(slot), device=slot.device) - start[slot])
        self.num_keys = int(key_len.max())
        keys = torch.arange(self.num_keys, device=slot.device)
        self.mask = (keys < key_len[self.gather].unsqueeze(-1)).unsqueeze(1)

    def attend(self, layer, query, key, value, scaling):
        slots = self.gather.shape[0]
        layer %= len(self.cache.keys)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slot, self.position] = key[0].transpose(0, 1)
        values[self.slot, self.position] = value[0].transpose(0, 1)
        keys, values = keys[:slots, : self.num_keys], values[:slots, : self.num_keys]
        padded = query[0].transpose(0, 1)[self.gather]
        out = _sdpa(padded.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), self.mask, scaling)
        return out.flatten(0, 1)[self.back].unsqueeze(0)


def _sdpa(query, key, value, mask, scaling: float) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2)
