"""Networks of the published checkpoints, written down plainly: float64, one token and one head at a time, no transformers.

Each takes a config.json and tensors under the names that its checkpoints use, and says what the logits are. Written from the
papers' and model cards' descriptions: LLaDA (arXiv 2502.09992), Dream (2508.15487), SDAR (2510.06303), LLaDA-MoE (2509.24389),
LLaDA2 (2512.15745) and their Qwen, Llama and Ling bases. A router's bias is float32 in every checkpoint.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass
class Plain:
    """One architecture at a tiny size. logits: (tensors, config.json, ids [T], positions [T], seen bool [T, T]) → float64
    [T, V] that predict each position itself; shapes: original name → shape; block: of its attention, 0 for full."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    logits: Any
    block: int
    stock: str
    spec: dict[str, Any] = field(default_factory=dict)

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: _draw(name, shape, generator) for name, shape in sorted(self.shapes.items())}
        return {name: tensor if name.endswith("expert_bias") else tensor.to(dtype) for name, tensor in drawn.items()}

    def seen(self, positions: torch.Tensor) -> torch.Tensor:
        """Bool [T, T], rows are queries: all, or earlier blocks of the absolute grid and one's own."""
        if not self.block:
            return torch.ones(len(positions), len(positions), dtype=torch.bool)
        grid = positions // self.block
        return grid[:, None] >= grid[None, :]


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name or "ln_f" in name:
        return 1 + 0.2 * values
    return 0.3 * values if len(shape) == 1 or "wte" in name or "embed" in name else values / shape[-1] ** 0.5


def rms(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def turn(x: torch.Tensor, position: int, theta: float, width: int) -> torch.Tensor:
    """Rotary embedding of one head's vector [D]: numbers i and i + width/2 are a complex number, turned by p · θ^(-2i / width);
    what lies beyond width stays."""
    half = width // 2
    angle = position * theta ** (-torch.arange(half, dtype=x.dtype) * 2 / width)
    turned = torch.complex(x[:half], x[half:width]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[width:]])


def attend(q, k, v, seen) -> torch.Tensor:
    """Lists over heads of lists over tokens of vectors [D] → [T, heads · D]. Key heads serve equal runs of query heads."""
    share, rows = len(q) // len(k), []
    for t in range(len(q[0])):
        row = []
        for head in range(len(q)):
            keys, values = torch.stack(k[head // share]), torch.stack(v[head // share])
            score = (keys @ q[head][t]) / math.sqrt(len(q[head][t]))
            row.append(torch.softmax(score.masked_fill(~seen[t], -math.inf), 0) @ values)
        rows.append(torch.cat(row))
    return torch.stack(rows)


def heads_of(x: torch.Tensor, dim: int) -> list[list[torch.Tensor]]:
    return [list(part.unbind(0)) for part in x.split(dim, 1)]


def self_attention(x, linear, dim, positions, seen, theta, width=None, norms=None):
    """linear: part → (weight, bias or None) of q, k, v, o; norms: (of queries, of keys, ε), of each head by itself."""
    project = lambda part, y: y @ linear[part][0].T + (0 if linear[part][1] is None else linear[part][1])  # noqa: E731
    q, k, v = (heads_of(project(part, x), dim) for part in "qkv")
    for which, group in enumerate((q, k)):
        for head in group:
            for t, position in enumerate(positions.tolist()):
                normed = head[t] if norms is None else rms(head[t], norms[which], norms[2])
                head[t] = turn(normed, position, theta, width or dim)
    return project("o", attend(q, k, v, seen))


def gated(x, gate, up, down) -> torch.Tensor:
    hidden = x @ gate.T
    return (hidden / (1 + torch.exp(-hidden)) * (x @ up.T)) @ down.T


def mixture(x, experts, choose) -> torch.Tensor:
    """choose: one token's vector → {expert: weight}."""
    return torch.stack([sum(w * gated(row, *experts[e]) for e, w in choose(row).items()) for row in x])


def best(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def expert_weights(t: Tensors, at: str, count: int) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(t[f"{at}.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")) for e in range(count)]


def qwen_logits(t, c, ids, positions, seen, *, bias=False, mlp=None):
    """Qwen2 (biases of q, k, v) and Qwen3 (norms of each head's queries and keys)."""
    t = {name: tensor.double() for name, tensor in t.items()}
    eps, dim = c["rms_norm_eps"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    x = t["model.embed_tokens.weight"][ids]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        linear = {p: (t[f"{at}.self_attn.{p}_proj.weight"], t.get(f"{at}.self_attn.{p}_proj.bias")) for p in "qkvo"}
        norms = None if bias else (t[f"{at}.self_attn.q_norm.weight"], t[f"{at}.self_attn.k_norm.weight"], eps)
        y = rms(x, t[f"{at}.input_layernorm.weight"], eps)
        x = x + self_attention(y, linear, dim, positions, seen, c["rope_theta"], norms=norms)
        y = rms(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        dense = [t.get(f"{at}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")]
        x = x + (gated(y, *dense) if dense[0] is not None else mlp(t, c, at, y))
    head = t["model.embed_tokens.weight" if c.get("tie_word_embeddings") else "lm_head.weight"]
    return rms(x, t["model.norm.weight"], eps) @ head.T


def softmax_router(normalised: bool):
    """Probabilities over all experts, the largest count; divided by their sum or not."""

    def mlp(t, c, at, y):
        def choose(row):
            p = torch.softmax(t[f"{at}.mlp.gate.weight"] @ row, 0).tolist()
            chosen = best(p, c["num_experts_per_tok"])
            total = sum(p[e] for e in chosen) if normalised else 1.0
            return {e: p[e] / total for e in chosen}

        return mixture(y, expert_weights(t, f"{at}.mlp", c["num_experts"]), choose)

    return mlp


def dream_logits(t, c, ids, positions, seen):
    """Qwen2 whose row p - 1 predicts position p; the first position has only itself to ask."""
    rows = qwen_logits(t, c, ids, positions, seen, bias=True)
    return torch.cat([rows[:1], rows[:-1]])


def llada_logits(t, c, ids, positions, seen):
    t = {name.removeprefix("model.transformer."): tensor.double() for name, tensor in t.items()}
    x, eps = t["wte.weight"][ids], c["rms_norm_eps"]
    for layer in range(c["n_layers"]):
        part = lambda name, layer=layer: t[f"blocks.{layer}.{name}.weight"]  # noqa: E731
        linear = {"q": part("q_proj"), "k": part("k_proj"), "v": part("v_proj"), "o": part("attn_out")}
        linear = {name: (weight, None) for name, weight in linear.items()}
        y = rms(x, part("attn_norm"), eps)
        x = x + self_attention(y, linear, c["d_model"] // c["n_heads"], positions, seen, c["rope_theta"])
        x = x + gated(rms(x, part("ff_norm"), eps), part("ff_proj"), part("up_proj"), part("ff_out"))
    return rms(x, t["ln_f.weight"], eps) @ (t["wte.weight"] if c["weight_tying"] else t["ff_out.weight"]).T


def sigmoid_router(t, c, at):
    """Sigmoid scores; groups are ranked by their two best scores with bias, experts of the best groups by score with bias;
    the weights are the scores without it, divided by their sum, times the scale."""

    def choose(row):
        score = torch.sigmoid(t[f"{at}.mlp.gate.weight"] @ row).tolist()
        biased = [s + b for s, b in zip(score, t[f"{at}.mlp.gate.expert_bias"].tolist(), strict=True)]
        size = c["num_experts"] // c["n_group"]
        groups = [biased[g * size : (g + 1) * size] for g in range(c["n_group"])]
        kept = best([sum(sorted(group)[-2:]) for group in groups], c["topk_group"])
        open_ = [b if e // size in kept else -math.inf for e, b in enumerate(biased)]
        chosen = best(open_, c["num_experts_per_tok"])
        total = sum(score[e] for e in chosen)
        return {e: c["routed_scaling_factor"] * score[e] / total for e in chosen}

    return choose


def llada2_logits(t, c, ids, positions, seen):
    t = {name: tensor.double() for name, tensor in t.items()}
    x, eps, dim = t["model.word_embeddings.weight"][ids], c["rms_norm_eps"], c["head_dim"]
    rows = [heads * dim for heads in (c["num_attention_heads"], c["num_key_value_heads"], c["num_key_value_heads"])]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        split = t[f"{at}.attention.query_key_value.weight"].split(rows)
        linear = {part: (weight, None) for part, weight in zip("qkv", split, strict=True)}
        linear["o"] = (t[f"{at}.attention.dense.weight"], None)
        norms = (t[f"{at}.attention.query_layernorm.weight"], t[f"{at}.attention.key_layernorm.weight"], eps)
        y, width = rms(x, t[f"{at}.input_layernorm.weight"], eps), int(dim * c["partial_rotary_factor"])
        x = x + self_attention(y, linear, dim, positions, seen, c["rope_theta"], width, norms)
        y = rms(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        mlp = lambda which, at=at: [t[f"{at}.mlp{which}.{part}_proj.weight"] for part in ("gate", "up", "down")]  # noqa: E731
        if layer < c["first_k_dense_replace"]:
            x = x + gated(y, *mlp(""))
        else:
            routed = mixture(y, expert_weights(t, f"{at}.mlp", c["num_experts"]), sigmoid_router(t, c, at))
            x = x + routed + gated(y, *mlp(".shared_experts"))
    return rms(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T


# Tiny checkpoints; ids as in the character tokenizer: pad 0, eos 1, mask 2. Like most of them, COMMON pads with its eos.

V, D, MLP, LAYERS, HEADS, KV, DIM, EXPERTS, WIDE = 40, 24, 36, 3, 4, 2, 8, 8, 12
COMMON = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "rope_scaling": None, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
    "torch_dtype": "float32", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    "tie_word_embeddings": False, "transformers_version": "4.52.4", "bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def mlp_shapes(at: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{at}.gate_proj.weight": (width, D), f"{at}.up_proj.weight": (width, D), f"{at}.down_proj.weight": (D, width)}


def expert_shapes(at: str) -> dict[str, tuple[int, ...]]:
    experts = [mlp_shapes(f"{at}.experts.{e}", WIDE) for e in range(EXPERTS)]
    return {f"{at}.gate.weight": (EXPERTS, D)} | {name: shape for one in experts for name, shape in one.items()}


def qwen_shapes(dim: int, kv: int, *, bias=False, norms=True, tied=False, sparse=()) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)} | ({} if tied else {"lm_head.weight": (V, D)})
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for part, heads in (("q", HEADS), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{part}_proj.weight"] = (heads * dim, D)
            shapes |= {f"{at}.self_attn.{part}_proj.bias": (heads * dim,)} if bias else {}
            shapes |= {f"{at}.self_attn.{part}_norm.weight": (dim,)} if norms and part in "qk" else {}
        shapes[f"{at}.self_attn.o_proj.weight"] = (D, HEADS * dim)
        shapes |= {f"{at}.input_layernorm.weight": (D,), f"{at}.post_attention_layernorm.weight": (D,)}
        shapes |= expert_shapes(f"{at}.mlp") if layer in sparse else mlp_shapes(f"{at}.mlp", MLP)
    return shapes


def llada_shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    root = "model.transformer"
    shapes = {f"{root}.wte.weight": (V, D), f"{root}.ln_f.weight": (D,)} | ({} if tied else {f"{root}.ff_out.weight": (V, D)})
    for layer in range(LAYERS):
        widths = {"attn_norm": (D,), "ff_norm": (D,), "ff_proj": (MLP, D), "up_proj": (MLP, D), "ff_out": (D, MLP)}
        widths |= {"q_proj": (D, D), "k_proj": (KV * D // HEADS, D), "v_proj": (KV * D // HEADS, D), "attn_out": (D, D)}
        shapes |= {f"{root}.blocks.{layer}.{name}.weight": shape for name, shape in widths.items()}
    return shapes


def llada2_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"model.word_embeddings.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.attention.query_key_value.weight": ((HEADS + 2 * KV) * DIM, D),
            f"{at}.attention.dense.weight": (D, HEADS * DIM),
            f"{at}.attention.query_layernorm.weight": (DIM,),
            f"{at}.attention.key_layernorm.weight": (DIM,),
            f"{at}.input_layernorm.weight": (D,),
            f"{at}.post_attention_layernorm.weight": (D,),
        }
        if layer == 0:
            shapes |= mlp_shapes(f"{at}.mlp", MLP)
        else:
            shapes |= expert_shapes(f"{at}.mlp") | mlp_shapes(f"{at}.mlp.shared_experts", WIDE)
            shapes[f"{at}.mlp.gate.expert_bias"] = (EXPERTS,)
    return shapes


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


ENDS = {"eos_token_ids": (1,)}
SDAR = Plain(
    config=COMMON | {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "head_dim": DIM, "mask_token_id": 2,
                     "block_size": 4, "attention_bias": False, "fuse_cross_entropy": True, "auto_map": {"AutoConfig": "x.Y"}},
    shapes=qwen_shapes(DIM, KV), logits=qwen_logits, block=4, stock="Qwen3ForCausalLM",
    spec={"attention": "block", "block_size": 4, "mask_token_id": 2, **ENDS},
)  # fmt: skip
SDAR_MOE = Plain(
    config=SDAR.config | {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "num_experts": EXPERTS,
                          "num_experts_per_tok": 2, "moe_intermediate_size": WIDE, "norm_topk_prob": True, "block_size": 8,
                          "mlp_only_layers": [1], "decoder_sparse_step": 1, "output_router_logits": True,
                          "router_aux_loss_coef": 0.001},
    shapes=qwen_shapes(DIM, KV, sparse=(0, 2)), block=8, stock="Qwen3MoeForCausalLM",
    logits=lambda *args: qwen_logits(*args, mlp=softmax_router(True)),
    spec={"attention": "block", "block_size": 8, "mask_token_id": 2, **ENDS},
)  # fmt: skip
DREAM = Plain(
    config=COMMON | {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": 2},
    shapes=qwen_shapes(D // HEADS, KV, bias=True, norms=False), logits=dream_logits, block=0, stock="Qwen2ForCausalLM",
    spec={"attention": "full", "block_size": 0, "mask_token_id": 2, "logit_shift": 1, **ENDS},
)  # fmt: skip
LLADA = Plain(
    config={
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": D, "n_heads": HEADS, "n_kv_heads": KV,
        "n_layers": LAYERS, "mlp_hidden_size": MLP, "mlp_ratio": 4, "vocab_size": 37, "embedding_size": V, "rope": True,
        "rope_theta": 500.0, "rms_norm_eps": 1e-5, "max_sequence_length": 256, "weight_tying": False, "block_type": "llama",
        "block_group_size": 1, "layer_norm_type": "rms", "layer_norm_with_affine": True, "activation_type": "silu",
        "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False, "attention_layer_norm": False,
        "alibi": False, "input_emb_norm": False, "scale_logits": False, "multi_query_attention": None, "init_device": "meta",
        "rope_full_precision": True, "mask_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "use_cache": False,
    },
    shapes=llada_shapes(False), logits=llada_logits, block=0, stock="LlamaForCausalLM",
    spec={"attention": "full", "block_size": 0, "mask_token_id": 2, "suppressed_ids": (0,), **ENDS},
)  # fmt: skip
LLADA_TIED = Plain(
    config=LLADA.config | {"weight_tying": True}, shapes=llada_shapes(True), logits=llada_logits, block=0,
    stock="LlamaForCausalLM", spec=LLADA.spec,
)  # fmt: skip
LLADA_MOE = Plain(
    config=without(COMMON, "intermediate_size", "rms_norm_eps") | {
        "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "expert_intermediate_size": WIDE, "qk_layernorm": True,
        "dense_intermediate_size": MLP, "shared_expert_intermediate_size": None, "num_experts": EXPERTS, "norm_topk_prob": True,
        "num_experts_per_tok": 3, "moe_layer_freq": [1, 0, 1], "num_key_value_heads": HEADS, "partial_rotary_factor": 1.0,
        "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "routed_scaling_factor": 1,
        "rms_norm_eps": 1e-5, "clip_qkv": None, "router_num_group": None,
    },
    shapes=qwen_shapes(D // HEADS, HEADS, sparse=(0, 2)), block=0, stock="Qwen3MoeForCausalLM",
    logits=lambda *args: qwen_logits(*args, mlp=softmax_router(False)),
    spec={"attention": "full", "block_size": 0, "mask_token_id": 2, **ENDS},
)  # fmt: skip
LLADA2 = Plain(
    config=COMMON | {
        "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "head_dim": DIM, "moe_intermediate_size": WIDE,
        "num_experts": EXPERTS, "num_experts_per_tok": 3, "num_shared_experts": 1, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "score_function": "sigmoid",
        "norm_topk_prob": True, "use_qk_norm": True, "use_qkv_bias": False, "use_bias": False, "norm_head": False,
        "moe_router_enable_expert_bias": True, "router_dtype": "fp32", "mask_token_id": 2, "block_size": 8,
        "embedding_dropout": 0.1, "output_dropout": 0.1,
    },
    shapes=llada2_shapes(), logits=llada2_logits, block=8, stock="Glm4MoeForCausalLM",
    spec={"attention": "block", "block_size": 8, "mask_token_id": 2, **ENDS},
)  # fmt: skip
A2D = Plain(
    config=COMMON | {"architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3", "head_dim": DIM, "mask_token_id": 2,
                     "tie_word_embeddings": True},
    shapes=qwen_shapes(DIM, KV, tied=True), logits=qwen_logits, block=0, stock="Qwen3ForCausalLM",
    spec={"attention": "full", "block_size": 0, "mask_token_id": 2, **ENDS},
)  # fmt: skip
A2D_QWEN2 = Plain(
    config=COMMON | {"architectures": ["A2DQwen2LMHeadModel"], "model_type": "a2d-qwen2", "mask_token_id": 2},
    shapes=qwen_shapes(D // HEADS, KV, bias=True, norms=False), block=0, stock="Qwen2ForCausalLM",
    logits=lambda *args: qwen_logits(*args, bias=True),
    spec={"attention": "full", "block_size": 0, "mask_token_id": 2, **ENDS},
)  # fmt: skip
OPEN_DCODER = Plain(
    config=COMMON | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "mask_token_id": 2,
                     "tie_word_embeddings": True},
    shapes=qwen_shapes(D // HEADS, KV, bias=True, norms=False, tied=True), logits=dream_logits, block=0,
    stock="Qwen2ForCausalLM", spec=DREAM.spec,
)  # fmt: skip

# family name → tiny checkpoints of it
PLAIN = {
    "sdar": SDAR, "sdar_moe": SDAR_MOE, "dream": DREAM, "llada": LLADA, "llada-tied": LLADA_TIED, "llada_moe": LLADA_MOE,
    "llada2": LLADA2, "a2d_qwen3": A2D, "a2d_qwen2": A2D_QWEN2, "open_dcoder": OPEN_DCODER,
}  # fmt: skip
