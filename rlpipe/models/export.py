"""Handing a model back the way it came: its own tensor names, configuration, tokenizer and code beside it.

Tensors are taken as they come, one stock parameter at a time, and a shard is written when it is full, so that besides the model
no more than one shard is in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlpipe.errors import ModelError
from rlpipe.models.checkpoint_files import INDEX, SINGLE
from rlpipe.models.family import BLOCK_KEYS, Family
from rlpipe.models.spec import CONFIG_KEY, DiffusionSpec
from rlpipe.models.weight_map import Origin, WeightMap

SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.model",
)  # fmt: skip
COMPANIONS = ("*.py", "*.jinja", "chat_template.json", "*.tiktoken", "generation_config.json", "LICENSE*", "NOTICE*")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a loaded model remembers. config: its config.json as it was; weights: how its tensors are named and cut there;
    copies: original names that repeat a tied parameter → the stock parameter."""

    folder: Path
    family: Family
    config: dict[str, Any]
    weights: WeightMap
    copies: Mapping[str, str] = field(default_factory=dict)


class ShardWriter:
    """Collects tensors into files of at most `shard_bytes` (a larger tensor stands alone); `close` writes the index."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.places: set[int] = set()
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        data = tensor.detach().cpu().contiguous()
        if data.data_ptr() in self.places:  # a file holds every tensor for itself, a repeated one too
            data = data.clone()
        self.places.add(data.data_ptr())
        self.pending[name] = data
        self.pending_bytes += tensor.nbytes

    def close(self) -> None:
        """One file has the plain name and needs no index."""
        self._flush()
        for old in (SINGLE, INDEX):
            (self.folder / old).unlink(missing_ok=True)
        if len(self.shards) == 1:
            self._part(0).replace(self.folder / SINGLE)
            return
        where = {}
        for number, names in enumerate(self.shards):
            file = self.folder / f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"
            self._part(number).replace(file)
            where |= dict.fromkeys(names, file.name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf8")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.writing"

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        part = self._part(len(self.shards))
        part.touch()
        readable = part.stat().st_mode  # as the user's umask has it: the library's own file is for its owner alone
        try:
            save_file(self.pending, part, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, mostly; callers know that as what it is
            raise OSError(str(error)) from error
        part.chmod(readable)
        self.shards.append(list(self.pending))
        self.total_bytes += self.pending_bytes
        self.pending, self.places, self.pending_bytes = {}, set(), 0


def original_tensors(
    weights: WeightMap,
    stock_names: Iterable[str],
    state: Iterable[tuple[str, torch.Tensor]],
    copies: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(original name, tensor) as soon as all that it is made of has come by. state: stock parameters, in any order, each once;
    what no original tensor waits for any more is let go. copies: original name → stock parameter, besides."""
    origins = {name: weights.original(name) for name in weights.original_names(stock_names)}
    origins |= {name: Origin.same(stock) for name, stock in (copies or {}).items()}
    waiting: dict[str, set[str]] = {}
    for name, origin in origins.items():
        for stock in origin.names:
            waiting.setdefault(stock, set()).add(name)
    here: dict[str, torch.Tensor] = {}
    for stock, tensor in state:
        here[stock] = tensor
        for name in sorted(waiting.get(stock, ())):
            needed = origins[name].names
            if all(part in here for part in needed):
                yield name, origins[name].make([here[part] for part in needed])
                for part in needed:
                    waiting[part].discard(name)
        for part in [part for part in here if not waiting.get(part)]:
            del here[part]
    lost = sorted({name for names in waiting.values() for name in names})
    if lost:
        raise ModelError(f"{len(lost)} tensors of the checkpoint could not be made, first {lost[0]}: parameters are missing")


def original_config(provenance: Provenance, spec: DiffusionSpec, dtype: torch.dtype) -> dict[str, Any]:
    """config.json as it was, with our entry, and with the keys corrected that would now say something else."""
    config = dict(provenance.config)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = str(dtype).removeprefix("torch.")
    if spec.block_size:
        config |= {key: spec.block_size for key in BLOCK_KEYS if key in config}
    if "mask_token_id" in config:
        config["mask_token_id"] = spec.mask_token_id
    return config | {CONFIG_KEY: spec.to_dict()}


def stock_config(lm: torch.nn.Module, spec: DiffusionSpec) -> dict[str, Any]:
    """config.json of a model that was made here."""
    setattr(lm.config, CONFIG_KEY, spec.to_dict())
    lm.config.architectures = [type(lm).__name__]
    lm.config.dtype = lm.dtype
    return json.loads(lm.config.to_json_string(use_diff=True))


def copy_companions(source: Path, target: Path) -> None:
    """The model's own code, templates, generation settings and licence, unchanged and never run."""
    _copy(source, target, COMPANIONS)


def copy_tokenizer(source: Path, target: Path) -> None:
    _copy(source, target, TOKENIZER_FILES)


def _copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
    if source.resolve() == target.resolve():
        return
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, target / file.name)
