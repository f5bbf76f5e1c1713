"""The sampler's forward: the stock model's arithmetic on the stock model's weights, in fewer and larger operations.

A step of a small or a well-fed model spends much of its time between the matrix products: a stock layer is some seventy
operations. Here queries, keys and values are one product, gate and up projection another, norms are fused; a mixture of
experts is left to the stock module. The learner keeps the stock code; a test per architecture, and the parity gauge at every
training step, hold the two together.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from rlpipe.models.attention import AttentionPlan

ARCHITECTURES = (
    "Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM",
)  # fmt: skip


class Executor:
    """hidden(input_ids, position_ids, plan) of one model. Call it under `torch.inference_mode`.

    The projections that are joined become views of one tensor, so that weights that are copied into the model in place arrive
    here too, and nothing is held twice.
    """

    def __init__(self, lm: nn.Module):
        self.lm = lm
        self.layers = [_Layer(layer) for layer in lm.model.layers]

    @classmethod
    def of(cls, lm: nn.Module) -> Executor | None:
        """None for an architecture that this does not know: the stock forward is used then."""
        return cls(lm) if cls.knows(lm) else None

    @staticmethod
    def knows(lm: nn.Module) -> bool:
        config = lm.config
        known = type(lm).__name__ in ARCHITECTURES and config.hidden_act == "silu"
        windowed = getattr(config, "use_sliding_window", False)
        return known and not windowed and not getattr(config, "attention_dropout", 0.0)

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """input_ids, position_ids int64 [1, T] → last hidden state [1, T, d], or [1, K, d] of the rows that the plan wants: the
        last layer then computes nothing but keys and values for the others."""
        model = self.lm.model
        x = functional.embedding(input_ids, model.embed_tokens.weight)
        cos, sin = model.rotary_emb(x, position_ids)
        half = sin.shape[-1] // 2
        cos, sin = cos.unsqueeze(2), torch.cat([-sin[..., :half], sin[..., half:]], -1).unsqueeze(2)
        home = there = x.device
        for index, layer in enumerate(self.layers):
            if layer.device != there:  # a model that is spread over devices, see `rlpipe.models.spreading`
                there = layer.device
                x, cos, sin, plan = x.to(there), cos.to(there), sin.to(there), plan.on(there)
            wanted = getattr(plan, "wanted", None)
            last = index == len(self.layers) - 1
            x = layer.last(x, cos, sin, plan, index, wanted) if last and wanted is not None else layer(x, cos, sin, plan, index)
        return _norm(model.norm, x.to(home))


class _Layer:
    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.qkv = _joined((attention.q_proj, attention.k_proj, attention.v_proj))
        self.out = attention.o_proj
        self.device = self.out.weight.device
        self.mlp = _DenseMLP(mlp) if hasattr(mlp, "gate_proj") else mlp
        self.queries = attention.q_proj.out_features
        self.heads = self.queries // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim

    def __call__(self, x: torch.Tensor, cos, sin, plan: AttentionPlan, index: int) -> torch.Tensor:
        joined = self._project(_norm(self.before, x), slice(None))
        query_key, value = joined[:, :, : self.heads + self.kv_heads], joined[:, :, self.heads + self.kv_heads :]
        if self.q_norm is not None:
            query_key = self._norm_heads(query_key)
        query_key = _rotate(query_key, cos, sin)
        query, key = query_key[:, :, : self.heads], query_key[:, :, self.heads :]
        seen = plan.attend(index, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.scaling)
        return self._finish(x, seen)

    def last(self, x: torch.Tensor, cos, sin, plan, index: int, wanted: torch.Tensor) -> torch.Tensor:
        """[1, K, d] of the wanted rows."""
        normed = _norm(self.before, x)
        key, value = self._project(normed, slice(self.queries, None)).split(self.kv_heads, 2)
        query = self._project(normed[:, wanted], slice(0, self.queries))
        if self.q_norm is not None:
            query, key = _norm(self.q_norm, query), _norm(self.k_norm, key)
        query, key = _rotate(query, cos[:, wanted], sin[:, wanted]), _rotate(key, cos, sin)
        seen = plan.attend_wanted(index, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.scaling)
        return self._finish(x[:, wanted], seen)

    def _project(self, x: torch.Tensor, outputs: slice) -> torch.Tensor:
        """[1, T, heads, head_dim] of some of the joined query, key and value outputs."""
        weight, bias = self.qkv
        joined = functional.linear(x, weight[outputs], None if bias is None else bias[outputs])
        return joined.view(*x.shape[:2], -1, self.head_dim)

    def _finish(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x = x + functional.linear(seen.flatten(2), self.out.weight, self.out.bias)
        return x + self.mlp(_norm(self.between, x))

    def _norm_heads(self, query_key: torch.Tensor) -> torch.Tensor:
        """Queries and keys [1, T, heads, head_dim] normed together: only the weights differ."""
        weight = torch.cat([self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)])
        return weight * _rms(query_key, self.q_norm.variance_epsilon)


class _DenseMLP:
    def __init__(self, mlp: nn.Module):
        self.gate_up, self.down = _joined((mlp.gate_proj, mlp.up_proj)), mlp.down_proj

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(x, *self.gate_up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, self.down.weight, self.down.bias)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [1, T, heads, head_dim], of as many of head_dim as cos has; the rotation's sign is in sin."""
    turned = x[..., : cos.shape[-1]]
    left, right = turned.chunk(2, -1)
    turned = torch.addcmul(turned * cos, torch.cat([right, left], -1), sin)
    return turned if turned.shape == x.shape else torch.cat([turned, x[..., cos.shape[-1] :]], -1)


def _norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm.weight * _rms(x, norm.variance_epsilon)


def _rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + ε) over the last axis, in float32 like the stock modules and rounded before the weight like them."""
    if x.is_cuda:
        return functional.rms_norm(x.float(), (x.shape[-1],), None, epsilon).to(x.dtype)
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # on a CPU rms_norm is some eight operations
    scale = torch.addcmul(wide.new_full((), epsilon), length, length, value=1.0 / x.shape[-1]).rsqrt_()
    return (wide * scale).to(x.dtype)


@torch.no_grad()
def _joined(parts: tuple[nn.Linear, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) of linear layers stacked; the layers' own parameters become views of it."""
    tensors = []
    for name in ("weight", "bias"):
        own = [getattr(part, name) for part in parts]
        if own[0] is None:
            tensors.append(None)
            continue
        stacked = _already_joined(own)
        if stacked is None:
            stacked = torch.cat([tensor.data for tensor in own])
            start = 0
            for tensor in own:
                tensor.data = stacked[start : start + len(tensor)]
                start += len(tensor)
        tensors.append(stacked)
    return tensors[0], tensors[1]


def _already_joined(own: list[torch.Tensor]) -> torch.Tensor | None:
    """The tensor that `own` are slices of, one behind the other in one storage, if they are (by an earlier executor)."""
    place, first = own[0].storage_offset(), own[0].data
    for tensor in own:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or tensor.storage_offset() != place or not tensor.is_contiguous():
            return None
        place += tensor.numel()
    return first.as_strided((sum(len(tensor) for tensor in own), *first.shape[1:]), first.stride(), own[0].storage_offset())
