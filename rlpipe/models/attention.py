"""One attention function for every model: the caller passes a plan, the stock modelling code calls it.

`transformers` lets an attention implementation be registered by name and hands unknown keyword arguments of the model
call down to it. So `model(input_ids, position_ids, plan=plan)` runs stock Qwen3 or Llama code with our visibility rule and
our cache, the same in rollout, learner and evaluation; that is what makes their log-probabilities agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

IMPLEMENTATION = "rlpipe"
COPY_ROWS, CALL_ROWS = 16, 32  # what copying a slot's keys and values, and a call of its own, cost in rows of attention


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


class DensePlan:
    """Every row sees what `mask` says: bool [N, T, T], True is visible; None: everything."""

    def __init__(self, mask: torch.Tensor | None):
        self.mask = None if mask is None else mask.unsqueeze(1)

    def attend(self, layer, query, key, value, scaling):
        return _sdpa(query, key, value, self.mask, scaling)


class SlotCache:
    """Key and value storage of the rollout: one slot a request, every position of its canvas.

    Rows of a step are packed: T rows of n slots in one sequence. They write their keys and values at (slot, store) and then see
    all positions of their slot below their own `key_len`. All rows of a step are written before any attends, so a clean block
    and the masked block behind it can share a forward (the fused commit) and the clean one never sees the other.

    device: of the first layer. Another layer's storage moves to where its keys are when it is first written.
    """

    def __init__(self, *, slots: int, positions: int, layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device):
        shape = (slots, positions, kv_heads, head_dim)
        self.storage = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * layers)]
        self._show(slots, positions)

    @classmethod
    def reuse(cls, spare: SlotCache | None, *, slots: int, positions: int, layers: int, **shape) -> SlotCache:
        """`spare` where it is large enough (what it holds is overwritten before it is seen), else a new one."""
        if spare is not None:
            have, like = spare.storage[0].shape, spare.storage[0]
            same = (like.dtype, like.device, *have[2:]) == (
                shape["dtype"], torch.device(shape["device"]), shape["kv_heads"], shape["head_dim"]
            )  # fmt: skip
            if same and len(spare.storage) == 2 * layers and have[0] >= slots and have[1] >= positions:
                spare._show(slots, positions)
                return spare
        return cls(slots=slots, positions=positions, layers=layers, **shape)

    def _show(self, slots: int, positions: int) -> None:
        views = [store[:slots, :positions] for store in self.storage]
        self.keys, self.values = views[0::2], views[1::2]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def keep(self, slots: torch.Tensor) -> None:
        """Compact to the given slots, in that order, when requests finish. Slots that stay where they are cost nothing."""
        here = torch.arange(len(slots), device=slots.device)
        target = (slots != here).nonzero().squeeze(1)
        source = slots[target]
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                store[target.to(store.device)] = store[source.to(store.device)]
                stores[layer] = store[: len(slots)]

    def copy_prefix(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Give slots `target` int64 [k] the first `length` positions of slots `source` int64 [k]: a prompt prefilled once."""
        for store in (*self.keys, *self.values):
            store[target.to(store.device), :length] = store[source.to(store.device), :length]

    def settle(self, layer: int, device: torch.device) -> None:
        """Move a layer's storage."""
        for half, shown in enumerate((self.keys, self.values)):
            store = self.storage[2 * layer + half].to(device)
            self.storage[2 * layer + half] = store
            shown[layer] = store[: shown[layer].shape[0], : shown[layer].shape[1]]

    def plan(
        self,
        slot: torch.Tensor,
        store: torch.Tensor,
        key_len: torch.Tensor,
        num_slots: int,
        hidden: torch.Tensor | None = None,
        wanted: torch.Tensor | None = None,
    ) -> SlotPlan:
        """slot, store, key_len int64 [T], rows grouped by slot in ascending order. hidden int64 [T]: a position that the row
        must not see, -1 for none; such a row is stored behind the canvas and sees itself there. wanted int64 [K], ascending:
        the rows whose last hidden state somebody reads; in the last layer the others only leave their keys and values."""
        return SlotPlan(self, slot, store, key_len, num_slots, hidden, wanted)


class SlotPlan:
    """One step over a `SlotCache`; see there. `attend` looks for all rows, `attend_wanted` for the wanted ones."""

    def __init__(self, cache: SlotCache, slot, store, key_len, num_slots: int, hidden=None, wanted=None):
        self.cache = cache
        self.where = slot * cache.storage[0].shape[1] + store  # in the storage's flattened slots and positions
        self.all = _Look(slot, store, key_len, num_slots, hidden)
        self.wanted = wanted
        if wanted is not None:
            part = [None if values is None else values[wanted] for values in (slot, store, key_len, hidden)]
            self.some = _Look(*part[:3], num_slots, part[3])

    def on(self, device: torch.device) -> SlotPlan:
        """The same step for layers on another device."""
        return moved(self, lambda tensor: tensor.to(device))

    def attend(self, layer, query, key, value, scaling):
        return self.all.attend(query, *self._write(layer, key, value), scaling)

    def attend_wanted(self, layer, query, key, value, scaling):
        """query [1, H, K, D] of the wanted rows, key and value of all → [1, K, H, D]."""
        return self.some.attend(query, *self._write(layer, key, value), scaling)

    def _write(self, layer, key, value) -> tuple[torch.Tensor, torch.Tensor]:
        layer %= len(self.cache.keys)
        if self.cache.storage[2 * layer].device != key.device:
            self.cache.settle(layer, key.device)
        for store, new in zip(self.cache.storage[2 * layer : 2 * layer + 2], (key, value), strict=True):
            store.flatten(0, 1)[self.where] = new[0].transpose(0, 1)
        return self.cache.keys[layer], self.cache.values[layer]


class _Look:
    """Packed rows that look at their slots. Slots with many more rows than the others (prefill, refresh) get their own call,
    so that the others are not padded to their length."""

    def __init__(self, slot, store, key_len, num_slots: int, hidden=None):
        counts = torch.bincount(slot, minlength=num_slots)
        start = counts.cumsum(0) - counts
        narrow = _narrow_width(counts.tolist())
        wide = (counts > narrow).nonzero().squeeze(1)
        rank = torch.arange(len(slot), device=slot.device) - start[slot]
        self.parts = [_Part(slice(0, num_slots), counts, start, narrow, key_len, store, hidden)]
        back = slot * narrow + rank
        if len(wide):
            most = int(counts.max())
            self.parts.append(_Part(wide, counts[wide], start[wide], most, key_len, store, hidden))
            place = torch.zeros_like(counts)
            place[wide] = torch.arange(len(wide), device=slot.device)
            beyond = num_slots * narrow + place[slot] * most + rank
            back = torch.where(counts[slot] > narrow, beyond, back)
        self.back = back

    def attend(self, query, keys, values, scaling):
        rows = query[0].transpose(0, 1)
        outs = [part.attend(rows, keys, values, scaling) for part in self.parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.index_select(0, self.back).unsqueeze(0)


def _narrow_width(counts: list[int]) -> int:
    """The row count up to which slots share a padded call; it minimises the rows computed, those above padded by themselves."""
    most, slots = max(counts), len(counts)
    if min(counts) == most:
        return most

    def cost(width: int) -> int:
        wide = sum(count > width for count in counts)
        return slots * width + (wide * (most + COPY_ROWS) + CALL_ROWS if wide else 0)

    return min(sorted(set(counts) - {0}), key=cost)


class _Part:
    """The rows of some slots (all, or indices), padded to `width` a slot with repetitions that are thrown away afterwards."""

    def __init__(self, slots, counts, start, width: int, key_len, store, hidden):
        self.slots, self.width = slots, width
        inside = torch.arange(width, device=counts.device)
        taken = torch.where((inside < counts.unsqueeze(1)) & (counts <= width).unsqueeze(1), inside, 0)
        self.gather = (start.unsqueeze(1) + taken).clamp_max(len(key_len) - 1)
        visible = key_len[self.gather]
        self.num_keys = int(visible.max())
        if hidden is not None:  # rows stored behind the canvas see themselves
            self.num_keys = max(self.num_keys, int(store.max()) + 1)
        keys = torch.arange(max(self.num_keys, 1), device=counts.device)
        mask = keys < visible.unsqueeze(-1)
        if hidden is not None:
            mask = (mask & (keys != hidden[self.gather].unsqueeze(-1))) | (keys == store[self.gather].unsqueeze(-1))
        self.mask = mask.unsqueeze(1)
        if self.mask.device.type == "cpu":  # a bool mask would be converted in every layer
            self.mask = torch.zeros(self.mask.shape).masked_fill_(~self.mask, float("-inf"))

    def attend(self, rows, keys, values, scaling) -> torch.Tensor:
        keys, values = keys[self.slots, : self.num_keys], values[self.slots, : self.num_keys]
        query = rows.index_select(0, self.gather.flatten()).view(*self.gather.shape, *rows.shape[1:])
        out = _sdpa(query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), self.mask, scaling)
        return out.flatten(0, 1)


def moved(plan, move: Callable[[torch.Tensor], torch.Tensor]):
    """A copy of a plan, or of a part of one, with its tensors moved; the cache stays the one that it is."""
    if isinstance(plan, torch.Tensor):
        return move(plan)
    if isinstance(plan, list):
        return [moved(part, move) for part in plan]
    if not isinstance(plan, (SlotPlan, _Look, _Part)):
        return plan
    twin = copy.copy(plan)
    for name, value in vars(plan).items():
        setattr(twin, name, moved(value, move))
    return twin


def _sdpa(query, key, value, mask, scaling: float) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2)
