"""Model folders: load and save as ordinary Hugging Face folders, with the diffusion spec inside config.json."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rlpipe.errors import ModelError
from rlpipe.models import attention
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.spec import CONFIG_KEY, DiffusionSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def read_spec(folder: str | Path) -> DiffusionSpec:
    """The diffusion spec of a model folder. Raises ModelError if there is no such folder or it carries no spec."""
    config = read_config(folder)
    if CONFIG_KEY not in config:
        raise ModelError(
            f"{folder}/config.json has no '{CONFIG_KEY}' entry, so nothing says how this model denoises. Add one, for example "
            f'"{CONFIG_KEY}": {{"mask_token_id": 151669, "eos_token_ids": [151643], "attention": "block", "block_size": 4}}'
        )
    return DiffusionSpec.from_dict(config[CONFIG_KEY])


def read_config(folder: str | Path) -> dict:
    """config.json as a dict; raises ModelError with the remedy."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"model.path={folder}: there is no {path.name} there. Give a folder with a saved model, or tiny:block or tiny:full"
        )
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error


def load_model(folder: str | Path, dtype: str = "float32", block_size: int = 0) -> DiffusionLM:
    """Load weights on the CPU in `dtype`; block_size > 0 overrides the grid of a block model. No remote code is run.

    Raises ModelError for missing folders, architectures we do not know, and weights that do not fit.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    spec = read_spec(folder)
    if block_size:
        spec = DiffusionSpec.from_dict(spec.to_dict() | {"block_size": block_size})
    architectures = read_config(folder).get("architectures") or ["unknown"]
    if architectures[0] not in SUPPORTED:
        raise ModelError(f"{folder} holds a {architectures[0]}; known are {', '.join(SUPPORTED)}")
    attention.register()
    _quiet()
    try:
        lm, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation=attention.IMPLEMENTATION, output_loading_info=True
        )
    except StrictDataclassError as error:
        raise ModelError(f"{folder}/config.json contradicts itself: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: the weights could not be loaded: {error}") from error
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if wrong:
        raise ModelError(f"{folder}: weights do not fit the architecture, first of {len(wrong)}: {wrong[0]}")
    return DiffusionLM(lm, spec)


def load_tokenizer(folder: str | Path):
    """The folder's tokenizer; raises ModelError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no tokenizer could be loaded: {error}") from error


def save_model(model: DiffusionLM, tokenizer, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write weights, config (with the spec) and tokenizer; `load_model` and plain transformers read it back.

    state: parameters by name, for a model whose own are sharded.
    """
    _quiet()
    setattr(model.lm.config, CONFIG_KEY, model.spec.to_dict())
    model.lm.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _quiet() -> None:
    """No progress bars of transformers: workers would write them into the driver's console."""
    from transformers.utils import logging

    logging.disable_progress_bar()
