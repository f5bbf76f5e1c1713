"""Tiny models and prompts that several tests share."""

from functools import cache

import guides
import numpy as np

from rlpipe.config import DecoderConfig, ModelConfig
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.spec import DiffusionSpec
from rlpipe.models.tiny import build_tiny
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.request import Request

ALPHABET = "0123456789_+-*/=() "


@cache
def tiny(kind: str, seed: int = 0):
    """(model, tokenizer): two layers, weights large enough that predictions differ from position to position."""
    model, tokenizer = build_tiny(ModelConfig(path=f"tiny:{kind}", layers=2, width=32, heads=2, mlp=64), ALPHABET, seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2.0)
    return model, tokenizer


def with_spec(model, **changes):
    """The same weights read with another spec."""
    return DiffusionLM(model.lm, DiffusionSpec.from_dict(model.spec.to_dict() | changes))


def prompts(tokenizer, count: int, ragged: bool = True) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    texts = ["".join(rng.choice(list(ALPHABET), 3 + (5 * i) % 11 if ragged else 8)) for i in range(count)]
    return [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]


def sample(model, tokens, seeds=None, version: int = 0, slots: int = 0, budgets=None, guide=None, **decoder):
    """Trajectories for the given prompts. budgets: max_tokens of each · guide: of guided decoders, else one that now and then
    says what the draft says."""
    settings = Decoder.resolve(DecoderConfig(**decoder), model.spec)
    seeds = list(range(len(tokens))) if seeds is None else seeds
    budgets = [0] * len(tokens) if budgets is None else budgets
    requests = [
        Request(prompt_ids=ids, uid=f"p{seed}", sample=0, seed=seed, max_tokens=budget)
        for ids, seed, budget in zip(tokens, seeds, budgets, strict=True)
    ]
    guide = guide or guides.Guide(lambda before: 3 + sum(before) % (model.lm.config.vocab_size - 3))
    return Engine(model, guide).sample(requests, decoder=settings, version=version, slots=slots)
