"""From an autoregressive checkpoint to a diffusion LM: the same weights, one more token, another attention.

What comes out denoises badly until it has been adapted by supervised training (`python -m rlpipe.sft`): the weights have never
seen the mask, nor a token behind the one they predict.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from rlpipe.errors import ModelError
from rlpipe.models import attention
from rlpipe.models.hub import model_folder
from rlpipe.models.loading import load_tokenizer, read_config, save_model
from rlpipe.models.made_once import made_once
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.smollm2 import smollm2
from rlpipe.models.spec import CONFIG_KEY, DiffusionSpec

CONVERTIBLE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MASK_TOKEN = "<|MASK|>"
SMOLLM2 = "smollm2"
FORMAT = 1  # of cached conversions; raise it when the same source would give another model


def convert(source: str | Path, target: str | Path, block_size: int) -> DiffusionSpec:
    """Write the causal LM in folder `source` to the new folder `target` as a diffusion LM, in the dtype that it has.

    block_size above 0: block attention on that grid; a hidden row then predicts its own position, as SDAR's do, so this is
    what the adaptation has to teach. 0: full attention with logits shifted by one (row p - 1 predicts p), which keeps what
    the rows were trained to say, as Dream does (arXiv 2508.15487). The mask is a new token unless the tokenizer has one; its
    rows of the embedding and of an untied head are the mean of all others. All other logits stay what they were. Raises
    ModelError for a folder that is no stock causal LM of CONVERTIBLE, or is a diffusion LM already, and for a target that
    exists.
    """
    target = Path(target)
    _refuse(Path(source), target, block_size)
    lm, tokenizer = load_causal(source), load_tokenizer(source)
    spec = DiffusionSpec(
        mask_token_id=add_mask(lm, tokenizer),
        eos_token_ids=_ends(lm, tokenizer, source),
        attention="block" if block_size else "full",
        block_size=block_size,
        logit_shift=0 if block_size else 1,
        suppressed_ids=_padding(lm, tokenizer, source),
    )
    with made_once(target) as partial:
        save_model(DiffusionLM(lm, spec), tokenizer, partial)
    return spec


def converted(source: str, cache: Path, block_size: int) -> Path:
    """The converted folder of `source` under `cache`, made once; smollm2 stands for SmolLM2-135M-Instruct."""
    folder = fetched(source, cache)
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.glob("*") if file.is_file())
    content = json.dumps([FORMAT, str(folder.resolve()), block_size, files])
    target = cache / f"converted-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not (target / "config.json").is_file():
        convert(folder, target, block_size)
    return target


def fetched(source: str, cache: Path) -> Path:
    """The folder of a causal LM: `source` itself, a hub id's, or SmolLM2's under `cache`."""
    return smollm2(cache) if source == SMOLLM2 else model_folder(source)


def _refuse(source: Path, target: Path, block_size: int) -> None:
    config = read_config(source)
    if CONFIG_KEY in config:
        raise ModelError(f"{source} is a diffusion LM already (its config.json has '{CONFIG_KEY}'); give it as model.path")
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in CONVERTIBLE:
        raise ModelError(
            f"{source} holds a {architecture}; only causal LMs of the classes {', '.join(CONVERTIBLE)} can be converted. A "
            "diffusion LM needs no conversion: give its folder as model.path"
        )
    for key in ("quantization_config", "use_sliding_window"):
        if config.get(key):
            raise ModelError(f"{source}/config.json has {key}={config[key]}, which a converted model cannot have")
    if block_size < 0:
        raise ModelError(f"block_size={block_size}: a block holds at least one token; 0 means full attention")
    if target.exists():
        raise ModelError(f"{target} is there already; remove it or name another folder")


def load_causal(folder: str | Path):
    """The stock causal LM of a folder, in its own dtype. Raises ModelError if its weights cannot be read or do not fit."""
    from transformers import AutoModelForCausalLM

    attention.register()
    try:
        lm, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation=attention.IMPLEMENTATION, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: the weights could not be loaded: {error}") from error
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if wrong:
        raise ModelError(f"{folder}: weights do not fit the architecture, first of {len(wrong)}: {wrong[0]}")
    return lm


@torch.no_grad()
def add_mask(lm: nn.Module, tokenizer) -> int:
    """The mask's id; tokenizer and model get one if they have none. Its new rows are the mean of those of all tokens."""
    known, rows = len(tokenizer), lm.get_input_embeddings().weight.shape[0]
    if known > rows:
        raise ModelError(f"the tokenizer has {known} tokens and the embedding {rows} rows; they do not belong together")
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
    mask = tokenizer.mask_token_id
    if mask < known:  # the vocabulary had this token without calling it the mask
        return mask
    if mask >= rows:  # else the embedding is padded and has a row to spare
        lm.resize_token_embeddings(mask + 1, mean_resizing=False)
    tables = {id(m.weight): m.weight for m in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    for weight in tables.values():
        weight[mask] = weight[:known].float().mean(0).to(weight.dtype)
    return mask


def _ends(lm: nn.Module, tokenizer, source: str | Path) -> tuple[int, ...]:
    """EOS ids: the tokenizer's first, for it is what demonstrations end with."""
    found = [tokenizer.eos_token_id]
    for holder in (lm.config, lm.generation_config):
        value = getattr(holder, "eos_token_id", None)
        found += value if isinstance(value, list) else [value]
    if found[0] is None:
        raise ModelError(f"{source}: the tokenizer names no EOS token, so no answer could end; set eos_token in its config")
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _padding(lm: nn.Module, tokenizer, source: str | Path) -> tuple[int, ...]:
    pad = tokenizer.pad_token_id
    return () if pad is None or pad in _ends(lm, tokenizer, source) else (pad,)
