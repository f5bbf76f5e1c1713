"""Attention of packed rows that computes only what the visibility rule lets through.

A dense mask over a pack of T tokens costs T² and gives back what packing saved. On a CPU the queries of a response look at its
prompt and clean copy in one padded call and at their own noisy segment in another; the two are joined by their log-sum-exps,
forward and backward, as ring attention does (arXiv 2310.01889). On a GPU the same rule becomes FlexAttention's block mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch

from rlpipe.models.attention import DensePlan
from rlpipe.models.visibility import Tags, visibility, visible

HIDDEN = -1e30  # finite: a query that sees nothing in one part must not become NaN before it is joined with the others
SHORTEST = 0.7  # of a padded call's longest member: shorter ones get a call of their own
Span = tuple[int, int]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(slots=True)
class Looks:
    """Which queries look at which keys: every visible pair lies in exactly one look.

    spans: (queries, keys…), half-open ranges of the pack · segments: starts of noisy segments that look at themselves.
    """

    spans: list[tuple[Span, tuple[Span, ...]]] = field(default_factory=list)
    segments: list[np.ndarray] = field(default_factory=list)
    segment_size: int = 0

    def add(self, queries: Span, keys: tuple[Span, ...]) -> None:
        if keys:
            self.spans.append((queries, keys))

    def add_segments(self, starts: np.ndarray, size: int) -> None:
        self.segments.append(starts)
        self.segment_size = size

    def padded(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """[(query rows [n, Tq], key rows [n, Tk])], padded with -1; looks of similar size share an entry."""
        sizes = [(stop - start, sum(b - a for a, b in keys)) for (start, stop), keys in self.spans]
        order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i), reverse=True)
        bundles: list[list[int]] = []
        for i in order:
            longest = sizes[bundles[-1][0]] if bundles else (0, 0)
            alike = all(SHORTEST * most <= own <= most for own, most in zip(sizes[i], longest, strict=True))
            bundles.append([i]) if not alike else bundles[-1].append(i)
        parts = []
        for bundle in bundles:
            bundle.sort()  # rows that lie side by side are taken without a copy
            queries = _rows([(self.spans[i][0],) for i in bundle], max(sizes[i][0] for i in bundle))
            parts.append((queries, _rows([self.spans[i][1] for i in bundle], max(sizes[i][1] for i in bundle))))
        if self.segments:
            rows = np.concatenate(self.segments)[:, None] + np.arange(self.segment_size)
            parts.append((rows, rows))
        return parts


def _rows(members: list[tuple[Span, ...]], width: int) -> np.ndarray:
    rows = np.full((len(members), width), -1, np.int64)
    for row, spans in zip(rows, members, strict=True):
        flat = np.concatenate([np.arange(start, stop) for start, stop in spans])
        row[: len(flat)] = flat
    return rows


def plan_for(tags: Tags, looks: Looks):
    """The attention plan of a pack for the device its tags are on."""
    if tags.copy.is_cuda:
        return FlexPlan(tags)
    return PartsPlan(tags, looks)


def dense_plan(tags: Tags) -> DensePlan:
    """The rule itself as a [T, T] mask; the others are tested against it."""
    return DensePlan(visibility(tags)[None])


class PartsPlan:
    """The CPU path."""

    def __init__(self, tags: Tags, looks: Looks):
        seen = torch.zeros(len(tags.copy), dtype=torch.bool)
        self.parts = []
        for queries, keys in looks.padded():
            self.parts.append(_Part(tags, torch.from_numpy(queries), torch.from_numpy(keys), seen))
        if not bool(seen.all()):
            raise ValueError(f"{int((~seen).sum())} of {len(seen)} packed tokens look at nothing")

    def attend(self, layer, query, key, value, scaling):
        """query [1, H, T, D], key and value [1, Hkv, T, D] → [1, T, H, D]."""
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return _PackedAttention.apply(*rows, self, scaling)[None]


class _Part:
    """One padded call: n members, each with Tq query rows and Tk key rows of the pack."""

    def __init__(self, tags: Tags, queries: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor):
        self.shape = queries.shape, keys.shape
        self.queries, self.keys = _Take(queries), _Take(keys)
        real = (queries >= 0).unsqueeze(-1) & (keys >= 0).unsqueeze(-2)
        allowed = real & visible(tags[queries].map(lambda t: t.unsqueeze(-1)), tags[keys].map(lambda t: t.unsqueeze(-2)))
        padding = (queries < 0).unsqueeze(-1)
        self.mask = None
        if not bool((allowed | padding).all()):
            self.mask = torch.zeros(allowed.shape).masked_fill_(~allowed, HIDDEN).unsqueeze(1)
        valid = queries[queries >= 0]
        self.joins = bool(seen[valid].any())  # with what an earlier part found for the same rows
        seen[valid] = True

    def call(self, query, key, value, scaling: float):
        """(out [rows, H, D], log-sum-exp [rows, H]) of the part's own query rows, in order of the pack's padded layout."""
        q, k, v = self._inputs(query, key, value)
        out, lse = _forward(q, k, v, 0.0, False, attn_mask=self._mask(q), scale=scaling)
        return self.queries.real(out.transpose(1, 2)), self.queries.real(lse.transpose(1, 2))

    def back(self, grad, query, key, value, out, lse, scaling: float, into) -> None:
        """Add this part's share of the gradients into `into`, three tensors shaped like query, key and value."""
        q, k, v = self._inputs(query, key, value)
        g, o = (self.queries(t).transpose(1, 2) for t in (grad, out))
        norm = self.queries(lse)
        if self.queries.padding is not None:
            norm = norm.masked_fill(self.queries.padding.unsqueeze(-1), -HIDDEN)
        shares = _backward(g, q, k, v, o, norm.transpose(1, 2).contiguous(), 0.0, False, attn_mask=self._mask(q), scale=scaling)
        for total, share, take in zip(into, shares, (self.queries, self.keys, self.keys), strict=True):
            take.add(total, share.transpose(1, 2))

    def _inputs(self, query, key, value):
        return self.queries(query).transpose(1, 2), self.keys(key).transpose(1, 2), self.keys(value).transpose(1, 2)

    def _mask(self, query: torch.Tensor):
        return None if self.mask is None else self.mask.to(query.dtype)


class _Take:
    """Rows of a flat tensor [T, …] as a padded [n, width, …] and back. Rows that lie side by side are views."""

    def __init__(self, rows: torch.Tensor):
        self.shape = tuple(rows.shape)
        flat = rows.flatten()
        self.padding = (rows < 0) if bool((rows < 0).any()) else None
        self.index = flat.clamp_min(0)
        self.where = (flat >= 0).nonzero().squeeze(1) if self.padding is not None else None
        start = int(flat[0])
        self.span = None
        if self.padding is None and bool((flat == torch.arange(start, start + len(flat))).all()):
            self.span = slice(start, start + len(flat))
        real = flat if self.where is None else flat[self.where]
        self.rows = self.span if self.span is not None else real
        self.repeats = len(torch.unique(real)) < len(real)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        taken = tensor[self.span] if self.span is not None else tensor.index_select(0, self.index)
        return taken.view(*self.shape, *tensor.shape[1:]) if taken.is_contiguous() else taken.unflatten(0, self.shape)

    def real(self, padded: torch.Tensor) -> torch.Tensor:
        """[rows, …] of a padded [n, width, …], without the padding."""
        flat = padded.flatten(0, 1)
        return flat if self.where is None else flat.index_select(0, self.where)

    def add(self, total: torch.Tensor, padded: torch.Tensor) -> None:
        share = self.real(padded)
        if self.span is not None:
            total[self.span] += share
        elif self.repeats:
            total.index_add_(0, self.rows, share)
        else:
            total[self.rows] += share


class _PackedAttention(torch.autograd.Function):
    """Parts joined by their log-sum-exps. With the joined output and log-sum-exp each part's own backward pass is its share of
    the whole one: its probabilities are exp(score - joined log-sum-exp), and softmax's correction is a sum over the output."""

    @staticmethod
    def forward(ctx, query, key, value, plan: PartsPlan, scaling: float):
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        lse = query.new_full(query.shape[:2], HIDDEN, dtype=wide)
        for part in plan.parts:
            found, norm = part.call(query, key, value, scaling)
            rows = part.queries.rows
            if part.joins:
                joined = torch.logaddexp(lse[rows], norm)
                found = found * (norm - joined).exp_().unsqueeze(-1)
                found = found + out[rows] * (lse[rows] - joined).exp_().unsqueeze(-1)
                norm = joined
            out[rows], lse[rows] = found.to(out.dtype), norm
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scaling = plan, scaling
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        into = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
        for part in ctx.plan.parts:
            part.back(grad, query, key, value, out, lse, ctx.scaling, into)
        return (*into, None, None)


class FlexPlan:
    """The GPU path: the rule as a block-sparse mask of FlexAttention, compiled once for all shapes. (On a CPU it is computed
    densely and without gradients, which is enough to test it.)"""

    def __init__(self, tags: Tags):
        from torch.nn.attention.flex_attention import create_block_mask

        length = len(tags.copy)

        def rule(batch, head, query, key):
            return visible(tags[query], tags[key])

        self.mask = create_block_mask(rule, None, None, length, length, device=tags.copy.device)

    def attend(self, layer, query, key, value, scaling):
        grouped = query.shape[1] != key.shape[1]
        out = _flex(query.is_cuda)(query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2)


@functools.cache
def _flex(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
