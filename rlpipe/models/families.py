"""The families we know, recognised by config.json. docs/models.md says where each fact is from."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlpipe import user_code
from rlpipe.errors import ModelError
from rlpipe.models.family import Family, TokenFacts
from rlpipe.models.spec import CONFIG_KEY
from rlpipe.models.weight_map import Experts, Fused, Rename, Rule

MLP, ATTENTION = "model.layers.{layer}.mlp", "model.layers.{layer}.self_attn"
QWEN_ENDS = {"<|im_end|>": 151645, "<|endoftext|>": 151643}
CHATML = "ChatML (<|im_start|>role … <|im_end|>)"


def one_by_one(config) -> tuple[Rule, ...]:
    """Experts that the checkpoint holds one by one, under Qwen's names."""
    parts = tuple(f"{MLP}.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down"))
    count = getattr(config, "n_routed_experts", None) or config.num_experts
    return (
        Experts(f"{MLP}.experts.gate_up_proj", parts[:2], count),
        Experts(f"{MLP}.experts.down_proj", parts[2:], count),
    )


def _stock_rules(config) -> tuple[Rule, ...]:
    return one_by_one(config) if config.model_type in ("qwen3_moe", "glm4_moe") else ()


STOCK = Family(
    name="stock",
    architectures=(
        "Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM",
    ),
    stock="",
    rules=_stock_rules,
)  # fmt: skip

SDAR = Family(
    name="sdar",  # and TraDo, and those trained from them
    architectures=("SDARForCausalLM",),
    model_types=("sdar",),
    stock="Qwen3ForCausalLM",
    only={"use_regular_causal": (False,)},  # a causal prompt is another visibility rule
    attention="block",
    block_size=4,
    mask_token="<|MASK|>",
    mask_id=151669,
    ends=QWEN_ENDS,
    template=CHATML,
)

SDAR_MOE = Family(
    name="sdar_moe",
    architectures=("SDARMoeForCausalLM",),
    model_types=("sdar_moe",),
    stock="Qwen3MoeForCausalLM",
    only={"use_regular_causal": (False,)},
    required=("moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
    rules=one_by_one,
    attention="block",
    block_size=4,
    mask_token="<|MASK|>",
    mask_id=151669,
    ends=QWEN_ENDS,
    template=CHATML,
)

DREAM = Family(
    name="dream",  # Dream-v0, Dream-Coder, DiffuCoder
    architectures=("DreamModel",),
    model_types=("Dream", "dream"),
    stock="Qwen2ForCausalLM",
    defaults={"rms_norm_eps": 1e-6},
    only={"use_mrope": (False,)},
    logit_shift=1,
    mask_token="<|mask|>",
    mask_id=151666,
    ends=QWEN_ENDS,
    template=CHATML,
)

OPEN_DCODER = Family(
    name="open_dcoder",
    architectures=("Qwen2ForCausalLM",),
    stock="Qwen2ForCausalLM",
    marker="<M>",
    logit_shift=1,
    mask_token="<M>",
    mask_id=151665,
    ends=QWEN_ENDS,
    template=CHATML,
)

A2D_QWEN3 = Family(
    name="a2d_qwen3",
    architectures=("A2DQwen3LMHeadModel",),
    model_types=("a2d-qwen3",),
    stock="Qwen3ForCausalLM",
    mask_token="<|mask|>",
    mask_id=151669,
    ends=QWEN_ENDS,
    template=CHATML,
)

# Trained on blocks (BD3-LM); config.json is that of the others, so only model.family or its name on the hub tells
A2D_QWEN3_BLOCK = replace(A2D_QWEN3, name="a2d_qwen3_block", architectures=(), model_types=(), attention="block", block_size=32)

A2D_QWEN2 = Family(
    name="a2d_qwen2",
    architectures=("A2DQwen2LMHeadModel",),
    model_types=("a2d-qwen2",),
    stock="Qwen2ForCausalLM",
    mask_token="<|mask|>",
    ends=QWEN_ENDS,
    template=CHATML,
)

A2D_LLAMA = Family(
    name="a2d_llama",
    architectures=("A2DLlamaLMHeadModel",),
    model_types=("a2d-llama",),
    stock="LlamaForCausalLM",
    only={"mlp_bias": (False,)},
    mask_token="<|mask|>",
)

LLADA_NAMES = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
} | {
    f"model.layers.{{layer}}.{stock}.weight": f"model.transformer.blocks.{{layer}}.{original}.weight"
    for stock, original in {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "q_proj",
        "self_attn.k_proj": "k_proj",
        "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out",
        "post_attention_layernorm": "ff_norm",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    }.items()
}

LLADA = Family(
    name="llada",  # LLaDA-8B, LLaDA-1.5
    architectures=("LLaDAModelLM",),
    model_types=("llada",),
    stock="LlamaForCausalLM",
    keys={
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "vocab_size": "embedding_size",  # rows of the embedding; "vocab_size" may be smaller
        "tie_word_embeddings": "weight_tying",
    },
    defaults={"rms_norm_eps": 1e-5},
    only={
        "block_type": ("llama",), "block_group_size": (1,), "layer_norm_type": ("rms",), "activation_type": ("silu",),
        "rope": (True,), "alibi": (False,), "attention_layer_norm": (False,), "layer_norm_with_affine": (True,),
        "include_bias": (False,), "include_qkv_bias": (False,), "bias_for_layer_norm": (False,), "input_emb_norm": (False,),
        "scale_logits": (False,), "multi_query_attention": (False,), "clip_qkv": (),
    },
    rules=lambda config: tuple(Rename(*names) for names in LLADA_NAMES.items()),
    mask_token="<|mdm_mask|>",
    mask_id=126336,
    ends={"<|eot_id|>": 126348, "<|endoftext|>": 126081},
    template="<|startoftext|> and Llama-3's headers, turns end with <|eot_id|>",
)  # fmt: skip


def _llada_moe_layers(said: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    dense = [layer for layer, sparse in enumerate(said.get("moe_layer_freq", [])) if not sparse]
    unused = {} if dense or "intermediate_size" in values else {"intermediate_size": values.get("moe_intermediate_size")}
    return unused | {"mlp_only_layers": dense}


LLADA_MOE = Family(
    name="llada_moe",
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    model_types=("lladamoe", "llada_moe"),
    stock="Qwen3MoeForCausalLM",
    keys={"moe_intermediate_size": "expert_intermediate_size", "intermediate_size": "dense_intermediate_size"},
    defaults={"rms_norm_eps": 1e-5},
    fixed={"decoder_sparse_step": 1, "norm_topk_prob": False},  # whatever config.json says: the published code never divides
    only={
        "qk_layernorm": (True,), "partial_rotary_factor": (1,), "moe_router_score_function": ("softmax",),
        "moe_router_enable_expert_bias": (False,), "routed_scaling_factor": (1,), "clip_qkv": (),
        "shared_expert_intermediate_size": (),
    },
    required=("moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    adjust=_llada_moe_layers,
    rules=one_by_one,
    mask_token="<|mask|>",
    mask_id=156895,
    ends={"<|role_end|>": -1, "<|endoftext|>": 156892},
    template="<role>SYSTEM/HUMAN/ASSISTANT</role>",
)  # fmt: skip


def _llada2_router(said: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    rotary = said.get("partial_rotary_factor", 1.0)
    return {"norm_topk_prob": said.get("num_experts_per_tok", 0) > 1, "partial_rotary_factor": rotary}


def _llada2_names(config) -> tuple[Rule, ...]:
    layer, query, key = "model.layers.{layer}", config.num_attention_heads, config.num_key_value_heads
    split = tuple(f"{ATTENTION}.{part}_proj.{{tensor}}" for part in "qkv")
    rows = tuple(heads * config.head_dim for heads in (query, key, key))
    return (
        Rename("model.embed_tokens.weight", "model.word_embeddings.weight"),
        Fused(split, f"{layer}.attention.query_key_value.{{tensor}}", rows),
        Rename(f"{ATTENTION}.o_proj.{{tensor}}", f"{layer}.attention.dense.{{tensor}}"),
        Rename(f"{ATTENTION}.q_norm.weight", f"{layer}.attention.query_layernorm.weight"),
        Rename(f"{ATTENTION}.k_norm.weight", f"{layer}.attention.key_layernorm.weight"),
        Rename(f"{MLP}.gate.e_score_correction_bias", f"{MLP}.gate.expert_bias"),
        *one_by_one(config),
    )


LLADA2 = Family(
    name="llada2",  # LLaDA2.0, 2.1
    architectures=("LLaDA2MoeModelLM",),
    model_types=("llada2_moe",),
    stock="Glm4MoeForCausalLM",
    keys={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts", "attention_bias": "use_qkv_bias"},
    defaults={"use_qk_norm": True},
    fixed={"num_nextn_predict_layers": 0},
    only={
        "use_bias": (False,), "norm_head": (False,), "score_function": ("sigmoid",), "moe_router_enable_expert_bias": (True,),
    },
    required=(
        "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
        "routed_scaling_factor", "first_k_dense_replace",
    ),
    adjust=_llada2_router,
    rules=_llada2_names,
    attention="block",
    block_size=32,
    mask_token="<|mask|>",
    mask_id=156895,
    ends={"<|role_end|>": -1, "<|endoftext|>": 156892},
    template="<role>SYSTEM/HUMAN/ASSISTANT</role>",
)  # fmt: skip

FAMILIES = {
    family.name: family
    for family in (
        STOCK, SDAR, SDAR_MOE, DREAM, LLADA, LLADA_MOE, LLADA2, OPEN_DCODER, A2D_QWEN3, A2D_QWEN3_BLOCK, A2D_QWEN2, A2D_LLAMA,
    )
}  # fmt: skip

CANNOT = {
    "Fast_dLLM_QwenForCausalLM": "it shifts logits inside blocks, and a shift goes with full attention only",
    "DiffusionGemmaForBlockDiffusion": "it denoises from uniform noise and has no mask token",
    "NemotronLabsDiffusionModel": "no family describes its network yet",
    "DreamForCausalLM": "it shares the name with Dream, but neither its mask nor its shift",
}


def find_family(config: Mapping[str, Any], name: str = "", tokens: TokenFacts | None = None) -> Family:
    """The family of a config.json, or the one called `name` (of ours, or `file.py:NAME`).

    tokens: of the folder's tokenizer; without them a family that only its tokenizer tells from a plain model is not found.
    Raises ModelError with the nearest known name, ConfigError for a file that has no such family.
    """
    if name:
        return _named(name)
    architecture = next(iter(config.get("architectures") or ()), "")
    found = [family for family in FAMILIES.values() if architecture in family.architectures]
    marked = [family for family in found if family.marker and tokens and family.marker in tokens.added]
    plain = [family for family in found if not family.marker]
    if marked and CONFIG_KEY not in config:
        return marked[0]
    if not architecture:
        plain = [family for family in FAMILIES.values() if config.get("model_type") in family.model_types]
    if not plain:
        raise ModelError(_unknown(architecture, str(config.get("model_type", ""))))
    if plain[0] is STOCK and CONFIG_KEY not in config:
        others = ", ".join(family.name for family in found if family.marker)
        raise ModelError(
            f"config.json names {architecture} and has no '{CONFIG_KEY}' entry, so nothing says how this model denoises. Add "
            f'one, for example "{CONFIG_KEY}": {{"mask_token_id": 151669, "eos_token_ids": [151643], "attention": "block", '
            f'"block_size": 4}}{f", or set model.family ({others})" if others else ""}'
        )
    return plain[0]


def _named(name: str) -> Family:
    if ":" in name:
        return user_code.load("model.family", name, lambda found: isinstance(found, Family), "Family")
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.0)[0]
        raise ModelError(f"model.family={name}: unknown; did you mean {near}? Known: {', '.join(FAMILIES)}, or my_file.py:NAME")
    return FAMILIES[name]


def _unknown(architecture: str, model_type: str) -> str:
    if architecture in CANNOT:
        return f"config.json names {architecture}, which cannot be used: {CANNOT[architecture]}"
    known = {name: family for family in FAMILIES.values() for name in (*family.architectures, *family.model_types)}
    said = architecture or model_type or "nothing"
    near = difflib.get_close_matches(said, known, n=1, cutoff=0.0)
    return (
        f"config.json names {said}; the nearest known is {near[0]} (model.family={known[near[0]].name}). Known: "
        f"{', '.join(FAMILIES)}. A family of your own goes into a file: model.family=my_file.py:NAME"
    )
