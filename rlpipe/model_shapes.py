"""How large a model is, from its config.json or, for published ones, from a table: what a plan needs before any weight is here.

Arithmetic only, without torch or transformers. A folder's own files win over the table as soon as they are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a decoder with gated MLPs; widths are those of one token. experts: of each sparse layer, 0 for a dense model; `mlp` is
    then the width of the dense layers."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    experts: int = 0
    active_experts: int = 0
    expert_mlp: int = 0
    shared_experts: int = 0  # of the experts' width
    dense_layers: int = 0  # of a sparse model

    @property
    def parameters(self) -> int:
        return self._count(self.experts)

    @property
    def active(self) -> int:
        """Parameters that one token meets."""
        return self._count(self.active_experts)

    @property
    def kv_values(self) -> int:
        """Numbers in the cache of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def _count(self, experts: int) -> int:
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads) + 2 * self.width
        dense = self.layers if not self.experts else self.dense_layers
        sparse_layer = 3 * self.width * self.expert_mlp * (experts + self.shared_experts) + self.experts * self.width
        body = self.layers * attention + dense * 3 * self.width * self.mlp + (self.layers - dense) * sparse_layer
        return body + (1 if self.tied else 2) * self.vocabulary * self.width + self.width


@dataclass(frozen=True, slots=True)
class Published:
    """A model on the hub. block: of its attention, 0 for full."""

    shape: Shape
    block: int


QWEN = {"head_dim": 128, "vocabulary": 151936}
QWEN3_0_6B = Shape(layers=28, width=1024, mlp=3072, heads=16, kv_heads=8, tied=True, **QWEN)
QWEN3_1_7B = Shape(layers=28, width=2048, mlp=6144, heads=16, kv_heads=8, **QWEN)
QWEN3_4B = Shape(layers=36, width=2560, mlp=9728, heads=32, kv_heads=8, **QWEN)
QWEN3_8B = Shape(layers=36, width=4096, mlp=12288, heads=32, kv_heads=8, **QWEN)
QWEN3_30B = Shape(
    layers=48, width=2048, mlp=6144, heads=32, kv_heads=4, experts=128, active_experts=8, expert_mlp=768, **QWEN
)  # fmt: skip
QWEN2_0_5B = Shape(layers=24, width=896, mlp=4864, heads=14, kv_heads=2, head_dim=64, vocabulary=151936, tied=True)
QWEN2_7B = Shape(layers=28, width=3584, mlp=18944, heads=28, kv_heads=4, head_dim=128, vocabulary=152064)
LLADA_8B = Shape(layers=32, width=4096, mlp=12288, heads=32, kv_heads=32, head_dim=128, vocabulary=126464)
LLADA_MOE = Shape(
    layers=16, width=2048, mlp=1024, heads=16, kv_heads=16, head_dim=128, vocabulary=157184,
    experts=64, active_experts=8, expert_mlp=1024,
)  # fmt: skip
LLADA2_MINI = Shape(
    layers=20, width=2048, mlp=5120, heads=16, kv_heads=4, head_dim=128, vocabulary=157184,
    experts=256, active_experts=8, expert_mlp=512, shared_experts=1, dense_layers=1,
)  # fmt: skip
LLADA2_FLASH = Shape(
    layers=32, width=4096, mlp=9216, heads=32, kv_heads=4, head_dim=128, vocabulary=157184,
    experts=256, active_experts=8, expert_mlp=1024, shared_experts=1, dense_layers=1,
)  # fmt: skip
SDAR = {"1.7B": QWEN3_1_7B, "4B": QWEN3_4B, "8B": QWEN3_8B, "30B-A3B": QWEN3_30B}
PUBLISHED: dict[str, Published] = {
    **{f"JetLM/SDAR-{size}-Chat": Published(shape, 4) for size, shape in SDAR.items()},
    **{f"JetLM/SDAR-{size}-Chat-b{block}": Published(SDAR[size], block) for size in SDAR for block in (8, 16, 32, 64)},
    "JetLM/SDAR-30B-A3B-Sci": Published(QWEN3_30B, 4),
    "Gen-Verse/TraDo-4B-Instruct": Published(QWEN3_4B, 4),
    "Gen-Verse/TraDo-8B-Instruct": Published(QWEN3_8B, 4),
    "Gen-Verse/TraDo-8B-Thinking": Published(QWEN3_8B, 4),
    "OpenMOSS-Team/DiRL-8B-Instruct": Published(QWEN3_8B, 4),
    "GSAI-ML/LLaDA-8B-Base": Published(LLADA_8B, 0),
    "GSAI-ML/LLaDA-8B-Instruct": Published(LLADA_8B, 0),
    "GSAI-ML/LLaDA-1.5": Published(LLADA_8B, 0),
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": Published(LLADA_MOE, 0),
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": Published(LLADA_MOE, 0),
    "inclusionAI/LLaDA2.0-mini": Published(LLADA2_MINI, 32),
    "inclusionAI/LLaDA2.1-mini": Published(LLADA2_MINI, 32),
    "inclusionAI/LLaDA2.0-flash": Published(LLADA2_FLASH, 32),
    "Dream-org/Dream-v0-Base-7B": Published(QWEN2_7B, 0),
    "Dream-org/Dream-v0-Instruct-7B": Published(QWEN2_7B, 0),
    "Dream-org/Dream-Coder-v0-Base-7B": Published(QWEN2_7B, 0),
    "Dream-org/Dream-Coder-v0-Instruct-7B": Published(QWEN2_7B, 0),
    "apple/DiffuCoder-7B-Base": Published(QWEN2_7B, 0),
    "apple/DiffuCoder-7B-Instruct": Published(QWEN2_7B, 0),
    "apple/DiffuCoder-7B-cpGRPO": Published(QWEN2_7B, 0),
    "fredzzp/open-dcoder-0.5B": Published(QWEN2_0_5B, 0),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": Published(QWEN3_0_6B, 0),
}
BLOCK_OF_ARCHITECTURE = {  # of folders without an entry of ours; "block_size" beside it in their config.json wins
    "SDARForCausalLM": 4, "SDARMoeForCausalLM": 4, "LLaDA2MoeModelLM": 32, "LLaDAModelLM": 0, "LLaDAMoEModelLM": 0,
    "LLaDAMoEModel": 0, "DreamModel": 0, "A2DQwen3LMHeadModel": 0, "A2DQwen2LMHeadModel": 0, "A2DLlamaLMHeadModel": 0,
}  # fmt: skip
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` reads like OWNER/NAME and is no folder here."""
    return bool(HUB_ID.fullmatch(str(path))) and not Path(path).exists()


def local_folder(path: str | Path, revision: str = "") -> Path | None:
    """The folder with a config.json that `path` names: itself, or the local copy of a hub id. No network is used."""
    if (Path(path) / "config.json").is_file():
        return Path(path)
    if not is_hub_id(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(path), "config.json", revision=revision or None)
    return Path(found).parent if isinstance(found, str) else None


def declared(path: str | Path, revision: str = "") -> dict[str, Any] | None:
    """config.json of a folder or of a hub id's local copy, None without one. Raises ModelError if it is damaged."""
    folder = local_folder(path, revision)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{folder / 'config.json'}:{error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{folder / 'config.json'}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    return config if isinstance(config, dict) else {}


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """From the keys that Llama, Qwen, LLaDA and their MoE kin use; None if one is missing or is no
    number."""

    def first(*names: str, otherwise: int = 0) -> int:
        return next((config[name] for name in names if isinstance(config.get(name), int)), otherwise)

    width, heads = first("hidden_size", "d_model"), first("num_attention_heads", "n_heads")
    layers, vocabulary = first("num_hidden_layers", "n_layers"), first("embedding_size", "vocab_size")
    mlp = first("intermediate_size", "mlp_hidden_size", "dense_intermediate_size")
    expert_mlp = first("moe_intermediate_size", "expert_intermediate_size", otherwise=mlp)
    if not (width and heads and layers and vocabulary and (mlp or expert_mlp)):
        return None
    experts = first("num_experts", "n_routed_experts")
    dense, sparse = (
        value if isinstance(value, list) else [] for value in map(config.get, ("mlp_only_layers", "moe_layer_freq"))
    )
    listed = dense or [layer for layer in sparse if not layer]
    return Shape(
        layers=layers, width=width, mlp=mlp, heads=heads, vocabulary=vocabulary,
        kv_heads=first("num_key_value_heads", "n_kv_heads", otherwise=heads),
        head_dim=first("head_dim", otherwise=width // heads),
        tied=bool(config.get("tie_word_embeddings", config.get("weight_tying", False))),
        experts=experts, active_experts=first("num_experts_per_tok"), expert_mlp=expert_mlp if experts else 0,
        shared_experts=first("num_shared_experts", "n_shared_experts") if experts else 0,
        dense_layers=first("first_k_dense_replace", otherwise=len(listed)) if experts else 0,
    )  # fmt: skip


def block_of(config: Mapping[str, Any]) -> int | None:
    """The attention block that a config.json declares, 0 for full attention; None if it does not say."""
    diffusion = config.get("diffusion")
    if isinstance(diffusion, Mapping):
        return 0 if diffusion.get("attention") == "full" else diffusion.get("block_size")
    named = config.get("architectures")
    known = BLOCK_OF_ARCHITECTURE.get(named[0]) if isinstance(named, list) and named else None
    said = config.get("block_size") or config.get("block_length")
    return said if known and isinstance(said, int) else known
