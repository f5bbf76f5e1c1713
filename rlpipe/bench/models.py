"""Models to measure: random weights of a given size, made on the spot, or a model folder.

Speed depends on shapes and not on what a model has learned, except where a decoder commits by confidence: how many tokens a
step commits under random weights says nothing about a trained model.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch

from rlpipe.config import ModelConfig
from rlpipe.errors import ConfigError
from rlpipe.models import attention
from rlpipe.models.loading import DTYPES, load_model
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.spec import DiffusionSpec
from rlpipe.models.tiny import KINDS, build_tiny

BLOCK_SIZE = 4
INIT_STD = 0.05  # flat enough to be harmless, uneven enough that the largest logit is not a matter of rounding
SHAPES = {  # layers · width · MLP width · heads · key-value heads · head width · vocabulary
    "3m": (5, 192, 576, 6, 6, 32, 2048),
    "30m": (8, 512, 1536, 8, 4, 64, 4096),
    "30m-32k": (5, 512, 1536, 8, 4, 64, 32768),  # input and output embeddings tied: half of the parameters
    "135m": (30, 576, 1536, 9, 3, 64, 49152),  # as SmolLM2-135M
    "sdar-1.7b": (28, 2048, 6144, 16, 8, 128, 151936),
    "sdar-4b": (36, 2560, 9728, 32, 8, 128, 151936),
}
LARGE = ("sdar-1.7b", "sdar-4b")
TIED = ("30m-32k", "135m", "sdar-1.7b")
NAMES = ("3m", "30m", "30m-32k", "135m", "3m:full", "30m:full", *KINDS, *LARGE)


def build(name: str, *, device: str, dtype: str, seed: int) -> DiffusionLM:
    """A model by name (NAMES) or folder, on `device`, ready to sample. Raises ConfigError or ModelError."""
    if name in KINDS:
        model, _ = build_tiny(ModelConfig(path=name), string.digits + string.ascii_lowercase + "+-*/=() ", seed)
    elif name in NAMES:
        if name in LARGE and device == "cpu":
            raise ConfigError(f"model={name} is for a GPU: it has billions of parameters; give device=cuda, or model=30m")
        shape, _, kind = name.partition(":")
        model = _random(SHAPES[shape], kind or "block", device, DTYPES[dtype], seed, tied=shape in TIED)
    elif (Path(name) / "config.json").is_file():
        model = load_model(name, dtype)
    else:
        raise ConfigError(f"model={name}: there is no such model folder; models made on the spot are {', '.join(NAMES)}")
    return model.to(device).eval()


@torch.no_grad()
def _random(shape: tuple[int, ...], kind: str, device: str, dtype: torch.dtype, seed: int, tied: bool) -> DiffusionLM:
    """Stock Qwen3 class (block attention) or Llama class (full attention); the last two ids are EOS and MASK."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    attention.register()
    model_class, config_class = (Qwen3ForCausalLM, Qwen3Config) if kind == "block" else (LlamaForCausalLM, LlamaConfig)
    layers, width, mlp, heads, kv_heads, head_dim, vocabulary = shape
    config = config_class(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=vocabulary - 2,
    )
    config._attn_implementation = attention.IMPLEMENTATION
    with torch.device(device):
        lm = model_class._from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, INIT_STD, generator=generator)
        else:
            parameter.fill_(1.0)
    spec = DiffusionSpec(
        mask_token_id=vocabulary - 1,
        eos_token_ids=(vocabulary - 2,),
        attention=kind,
        block_size=BLOCK_SIZE if kind == "block" else 0,
    )
    return DiffusionLM(lm, spec)
