"""Tiny diffusion LMs made on the spot: stock classes, random weights, a character vocabulary.

They exist for the quickstart, tests and benches: a fraction of a million parameters that learn in a minute on two cores.
"""

from __future__ import annotations

import torch

from rlpipe.config import ModelConfig
from rlpipe.errors import ConfigError
from rlpipe.models import attention
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.spec import CONFIG_KEY, DiffusionSpec
from rlpipe.models.tokenizer import character_tokenizer

TINY_BLOCK_SIZE = 4
KINDS = {"tiny:block": "block", "tiny:full": "full"}
INIT_STD = 0.08  # a narrow model starts too flat with the usual 0.02: the warm start then needs twice the steps
ROPE_THETA = 10.0  # canvases of some tens of tokens; a base of 10 000 leaves most frequencies unused and learns far slower


def build_tiny(config: ModelConfig, alphabet: str, seed: int):
    """(DiffusionLM, tokenizer): Qwen3 class with block attention, or Llama class with full attention.

    Weights are drawn from a generator of our own (normal; norms 1), so neither the global RNG nor the transformers
    version matters. Raises ConfigError for an unknown kind or a width that the heads do not divide.
    """
    if config.path not in KINDS:
        raise ConfigError(f"model.path={config.path}: tiny models are {', '.join(KINDS)}")
    if config.width % config.heads or (config.width // config.heads) % 2:
        raise ConfigError(f"model.width {config.width} must give an even width to each of {config.heads} heads")
    tokenizer = character_tokenizer(alphabet)
    kind = KINDS[config.path]
    spec = DiffusionSpec(
        mask_token_id=tokenizer.mask_token_id,
        eos_token_ids=(tokenizer.eos_token_id,),
        attention=kind,
        block_size=(config.block_size or TINY_BLOCK_SIZE) if kind == "block" else 0,
        suppressed_ids=(tokenizer.pad_token_id, tokenizer.unk_token_id),
    )
    lm = _stock_model(config, kind, len(tokenizer), tokenizer)
    setattr(lm.config, CONFIG_KEY, spec.to_dict())
    _initialise(lm, torch.Generator().manual_seed(seed))
    return DiffusionLM(lm, spec), tokenizer


def _stock_model(config: ModelConfig, kind: str, vocabulary: int, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    attention.register()
    model_class, config_class = (Qwen3ForCausalLM, Qwen3Config) if kind == "block" else (LlamaForCausalLM, LlamaConfig)
    stock = config_class(
        vocab_size=vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.width // config.heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    stock._attn_implementation = attention.IMPLEMENTATION
    return model_class(stock)


@torch.no_grad()
def _initialise(lm: torch.nn.Module, generator: torch.Generator) -> None:
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, INIT_STD, generator=generator)
        else:
            parameter.fill_(1.0)
