"""Models in and out: a folder or a hub id becomes a DiffusionLM, and goes back in the layout that it came in.

No code of a model is ever run: its config.json says which family it is, and the family which stock class computes it. Weights
are read from safetensors, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from rlpipe.config import ModelConfig
from rlpipe.errors import ModelError
from rlpipe.models import attention, export
from rlpipe.models.adapters import merged_parameters
from rlpipe.models.checkpoint_files import WeightFiles
from rlpipe.models.export import (
    Provenance,
    ShardWriter,
    copy_companions,
    copy_tokenizer,
    original_config,
    original_tensors,
    stock_config,
)
from rlpipe.models.families import find_family
from rlpipe.models.family import Family, TokenFacts
from rlpipe.models.filling import (
    Mismatch,
    Partitioning,
    check_tied,
    compare,
    empty_in_shards,
    empty_model,
    fill,
    fill_shards,
    tied_copies,
)
from rlpipe.models.hub import model_folder
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.spec import CONFIG_KEY, DiffusionSpec

if not torch.cuda.is_available():  # transformers imports DeepSpeed where it is installed, which else says on the console that
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it found no GPU

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUCKET_BYTES = 256 * 2**20  # of parameters that are whole at a time while shards are filled


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a folder is, without its weights. config: config.json; tokenizer: None if the folder has none."""

    folder: Path
    config: dict[str, Any]
    family: Family
    spec: DiffusionSpec
    tokenizer: Any


def settings_of(model: ModelConfig) -> dict[str, Any]:
    """What a recipe says of its model, as keywords of `recognise`."""
    return {
        "revision": model.revision,
        "family": model.family,
        "block_size": model.block_size,
        "attention": model.attention,
        "mask_token_id": model.mask_token_id,
    }


def recognise(
    path: str | Path,
    *,
    revision: str = "",
    family: str = "",
    block_size: int = 0,
    attention: str = "",
    mask_token_id: int = -1,
) -> Recognised:
    """Family and diffusion spec of a folder or hub id, by its config.json and tokenizer.

    revision: of a hub id · family: instead of the one that config.json shows, ours or file.py:NAME · block_size, attention,
    mask_token_id: instead of what the model says (0, empty, -1). A block_size alone changes the grid of a block model;
    attention='block' with one gives a grid to a model with full attention, which then has to be adapted by training.
    Raises ModelError for an architecture that we do not know, and for a MASK, tokenizer or config that do not fit together.
    """
    folder = model_folder(path, revision)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    generation = _json(folder / "generation_config.json")
    facts = TokenFacts(generation=generation) if tokenizer is None else TokenFacts.of(tokenizer, generation)
    try:
        found = find_family(config, family, facts)
        spec = _changed(found.spec(_with_mask(config, mask_token_id), facts), block_size, attention)
        rows = found.config(config).vocab_size
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    if tokenizer is not None:
        check_tokenizer(folder, tokenizer, spec, rows, mask_given=mask_token_id >= 0)
    return Recognised(folder, config, found, spec, tokenizer)


def _with_mask(config: dict[str, Any], mask: int) -> dict[str, Any]:
    """config.json as if it named this MASK; as it is for -1."""
    if mask < 0:
        return config
    entry = config.get(CONFIG_KEY)
    own = {CONFIG_KEY: entry | {"mask_token_id": mask}} if isinstance(entry, dict) else {}
    return config | {"mask_token_id": mask} | own


def _changed(spec: DiffusionSpec, block_size: int, attention: str) -> DiffusionSpec:
    wanted = attention or spec.attention
    if block_size and wanted == "full":
        raise ModelError(
            f"model.block_size={block_size}, but this model has full attention. Leave it 0, or give the model a grid with "
            "model.attention=block"
        )
    size = 0 if wanted == "full" else block_size or spec.block_size
    if not size and wanted == "block":
        raise ModelError("model.attention=block gives this model a grid: say which with model.block_size, for example 4")
    return dataclasses.replace(spec, attention=wanted, block_size=size)


def check_tokenizer(folder: Path, tokenizer, spec: DiffusionSpec, rows: int, mask_given: bool = False) -> None:
    """Raises ModelError if the tokenizer makes ids that the embedding has no row for, or calls another token MASK."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ModelError(
            f"{folder}: the tokenizer has a token with id {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), and the "
            f"embedding has {rows} rows: they do not belong together. Put the model's own tokenizer files there"
        )
    mask = tokenizer.mask_token_id
    if mask is not None and mask != spec.mask_token_id and not mask_given:
        raise ModelError(
            f"{folder}: MASK has id {spec.mask_token_id} by config.json, and the tokenizer's mask token is "
            f"{tokenizer.mask_token!r} with id {mask}. Correct the wrong one, or say which it is with model.mask_token_id"
        )


def read_spec(path: str | Path, **settings: Any) -> DiffusionSpec:
    """The diffusion spec of a folder or hub id; keywords of `recognise`, which also says what is raised."""
    return recognise(path, **settings).spec


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json as a dict; raises ModelError with the remedy."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"model.path={folder}: there is no {path.name} there. Give a folder with a saved model, a hub id OWNER/NAME, or "
            "tiny:block or tiny:full"
        )
    config = _json(path)
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(f'{path}: "architectures" is {named!r}, and it is a list of names like ["SDARForCausalLM"]')
    return config


def load_model(
    path: str | Path,
    dtype: str = "float32",
    *,
    device: str | torch.device = "cpu",
    partitioning: Partitioning | None = None,
    **settings: Any,
) -> DiffusionLM:
    """A folder or hub id as a DiffusionLM in `dtype` on `device`; settings: keywords of `recognise`. No remote code is run.

    Host memory peaks at the model and one tensor. partitioning: parameters are sharded over ranks as they are made; all ranks
    must call. Raises ModelError as `recognise`, and for weights that are missing, damaged or do not fit.
    """
    known = recognise(path, **settings)
    model_class, config = _stock(known)
    weights = known.family.weights(known.config)
    lm = _empty(known, model_class, config, DTYPES[dtype])
    with WeightFiles(known.folder) as files:
        _check_fit(known, compare(lm, files, weights))
        copies = tied_copies(lm, files.tensors, weights)
        check_tied(files, weights, copies)
        if partitioning is None:
            fill(lm, files, weights, DTYPES[dtype], torch.device(device))
        else:
            shards = empty_in_shards(model_class, config, DTYPES[dtype], partitioning)
            lm = fill_shards(shards, files, weights, DTYPES[dtype], torch.device(device), partitioning, BUCKET_BYTES)
    model = DiffusionLM(lm, known.spec)
    model.provenance = Provenance(known.folder, known.family, known.config, weights, copies)
    return model


def _stock(known: Recognised) -> tuple[type, Any]:
    """(stock class, its config, with our attention)."""
    attention.register()
    try:
        config = known.family.config(known.config)
    except ModelError as error:
        raise ModelError(f"{known.folder}: {error}") from error
    config._attn_implementation = attention.IMPLEMENTATION
    return known.family.model_class(known.config), config


def _empty(known: Recognised, model_class: type, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    try:
        return empty_model(model_class, config, dtype)
    except ModelError as error:
        raise ModelError(f"{known.folder}: {error}") from error


def check_model(path: str | Path, **settings: Any) -> Recognised:
    """All that can be said before the weights are read: `recognise`, and whether the files hold what the class needs."""
    known = recognise(path, **settings)
    check_tensors(known)
    return known


def check_tensors(known: Recognised) -> None:
    """Raises ModelError, with the first few names, unless the folder's headers declare just what the class needs, and for a
    tied weight that is saved twice with different values."""
    lm, weights = _empty(known, *_stock(known), torch.float32), known.family.weights(known.config)
    with WeightFiles(known.folder) as files:
        _check_fit(known, compare(lm, files, weights))
        check_tied(files, weights, tied_copies(lm, files.tensors, weights))


def check_same_tokens(policy: str | Path, other: str | Path, **settings: Any) -> None:
    """Raises ModelError if a model that is to read the policy's responses (a value model) has other tokens than the policy.

    settings: keywords of `recognise`, but for revision.
    """
    ours, theirs = (recognise(path, **settings) for path in (policy, other))
    if ours.spec.mask_token_id != theirs.spec.mask_token_id:
        raise ModelError(
            f"{other}: MASK has id {theirs.spec.mask_token_id} there, and id {ours.spec.mask_token_id} in {policy}: the two "
            "must have the same tokens, so give a model of the policy's kind"
        )
    vocabularies = [known.tokenizer.get_vocab() for known in (ours, theirs) if known.tokenizer is not None]
    if len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
        raise ModelError(f"{other} has another vocabulary than {policy}, and has to read its responses. Give one of its kind")


def _check_fit(known: Recognised, wrong: Mismatch) -> None:
    if wrong:
        raise ModelError(f"{known.folder}: the weights do not fit {known.family.name} as config.json describes it: {wrong}")


TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_tokenizer(path: str | Path, revision: str = ""):
    """The tokenizer of a folder or hub id; raises ModelError if it has none.

    A tokenizer class of the model's own is not run: its files are read by the stock class of the same format.
    """
    from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2TokenizerFast

    folder = model_folder(path, revision)
    if not has_tokenizer(folder):
        raise ModelError(f"{folder}: no tokenizer could be loaded: none of {', '.join(TOKENIZERS)} is there")
    said = _json(folder / "tokenizer_config.json")
    try:
        if said.get("tokenizer_class") and "AutoTokenizer" not in (said.get("auto_map") or {}):
            # A config of no type: which class reads the tokenizer's files is not for the model's config.json to say.
            return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig(), trust_remote_code=False)
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return Qwen2TokenizerFast.from_pretrained(folder)  # vocab.json and merges.txt: Dream's class is a copy of Qwen2's
    except Exception as error:  # its reader raises bare exceptions too
        raise ModelError(f"{folder}: no tokenizer could be loaded: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """A file that a model may or may not have; {} without it. Raises ModelError if it is damaged or holds no object."""
    try:
        found = json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: a JSON object is expected there, and this is a {type(found).__name__}")
    return found


def save_model(
    model: DiffusionLM,
    tokenizer,
    folder: str | Path,
    state: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | None = None,
    shard_bytes: int = export.SHARD_BYTES,
    buffers: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, config (with the spec) and tokenizer in the layout that the model was loaded from.

    `load_model` reads it back identical to the bit, and what could read the original reads it too. A model that was made here
    is written as its stock class.

    model: a DiffusionLM or what has its `lm`, `spec` and `provenance` · state: stock parameters by name or as they come, for a
    model whose own are sharded; adapters are merged otherwise · shard_bytes: of one file · buffers: the stock model's by name,
    if its own may have moved. Raises OSError if the disk refuses.
    """
    lm, folder = model.lm, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    origin = model.provenance or _made_here(model)
    merged = merged_parameters(lm)
    saved = lm.state_dict(keep_vars=True).keys()
    held = dict(lm.named_buffers()) if buffers is None else buffers
    kept = [(name, buffer) for name, buffer in held.items() if name in saved]
    if state is None:
        state = ((part.name, part.tensor()) for part in merged)
    parameters = state.items() if isinstance(state, Mapping) else state
    names = [*(part.name for part in merged), *(name for name, _ in kept)]
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in original_tensors(origin.weights, names, chain(parameters, kept), origin.copies):
        writer.add(name, tensor)
    writer.close()
    if model.provenance is None:
        config = origin.config
        lm.generation_config.save_pretrained(folder)
    else:
        config = original_config(origin, model.spec, lm.dtype)
        copy_companions(origin.folder, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    same = Path(tokenizer.name_or_path or ".").resolve() == origin.folder.resolve() and has_tokenizer(origin.folder)
    if model.provenance is None or not same:
        tokenizer.save_pretrained(folder)
    else:
        copy_tokenizer(origin.folder, folder)


def _made_here(model: DiffusionLM) -> Provenance:
    config = stock_config(model.lm, model.spec)
    family = find_family(config)
    return Provenance(Path(), family, config, family.weights(config))
