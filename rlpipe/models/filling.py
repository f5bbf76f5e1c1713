"""From weight files into a model: a stock class without weights, then one tensor after the other.

Host memory peaks at the model and the tensors that one parameter is made of. Under ZeRO 3 parameters are created in shards and
filled a bucket at a time, so that no rank ever holds a whole copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from rlpipe.errors import ModelError
from rlpipe.models.checkpoint_files import WeightFiles
from rlpipe.models.weight_map import WeightMap
from rlpipe.models.weights import split_buckets

SHOWN = 3  # names in a message
COMPUTED = ("rotary_emb.inv_freq",)  # buffers that old versions of transformers saved; the model computes them


class Partitioning(Protocol):
    """Shards parameters over ranks. rank: of this process."""

    rank: int

    def creating(self, dtype: torch.dtype) -> AbstractContextManager:
        """Parameters of modules that are made inside become shards."""
        ...

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
        """The parameters are whole inside, and what rank 0 writes into them is kept. All ranks must enter."""
        ...

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""
        ...


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How a folder's tensors differ from what the architecture needs; original names."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]  # sentences

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:SHOWN])}{' …' if len(names) > SHOWN else ''}"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape", self.misshapen),
            )
            if names
        ]
        return "; ".join(parts)


def empty_model(model_class: type, config, dtype: torch.dtype) -> nn.Module:
    """The class on the meta device: names and shapes, no memory. Raises ModelError if the config describes none."""
    try:
        with torch.device("meta"):
            return model_class._from_config(config, dtype=dtype)
    except (RuntimeError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise ModelError(
            f"no {model_class.__name__} can be made of what config.json says: {type(error).__name__}: {_first_line(error)}"
        ) from error


def stock_tensors(lm: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, tied ones once."""
    saved = lm.state_dict(keep_vars=True)
    named = dict(lm.named_parameters())
    return named | {name: tensor for name, tensor in lm.named_buffers() if name in saved}


def compare(lm: nn.Module, files: WeightFiles, weights: WeightMap) -> Mismatch:
    """`lm` (on any device) against what the files declare; nothing is read."""
    stock = stock_tensors(lm)
    expected = weights.original_names(stock)
    missing = [name for name in expected if name not in files.tensors]
    allowed = {*expected, *tied_copies(lm, files.tensors, weights)}
    unexpected = [name for name in files.tensors if name not in allowed and not name.endswith(COMPUTED)]
    misshapen = []
    for name, tensor in stock.items():
        origin = weights.stock(name)
        if any(original not in files.tensors for original in origin.names):
            continue
        shapes = [files.tensors[original].shape for original in origin.names]
        try:
            made = tuple(origin.make([torch.empty(shape, device="meta") for shape in shapes]).shape)
        except (RuntimeError, ValueError, IndexError) as error:
            misshapen.append(f"{origin.names[0]} {list(shapes[0])} ({_first_line(error)})")
            continue
        if made != tuple(tensor.shape):
            misshapen.append(f"{origin.names[0]} {list(shapes[0])} gives {list(made)}, needed is {list(tensor.shape)}")
    return Mismatch(tuple(missing), tuple(unexpected), tuple(misshapen))


@torch.no_grad()
def fill(lm: nn.Module, files: WeightFiles, weights: WeightMap, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Give an `empty_model` its weights, in place."""
    for name, tensor in stock_tensors(lm).items():
        value = torch.empty(tensor.shape, dtype=_dtype_of(lm, name, dtype), device=device)
        value.copy_(_read(files, weights, name))
        _put(lm, name, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
    compute_buffers(lm, device)
    lm.tie_weights()
    return lm.eval()


def empty_in_shards(model_class: type, config, dtype: torch.dtype, partitioning: Partitioning) -> nn.Module:
    """The class with uninitialised parameters that are shards. transformers must not initialise them: they look empty."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), partitioning.creating(dtype):
        lm = model_class._from_config(config, dtype=dtype)
    lm.tie_weights()
    return lm


@torch.no_grad()
def fill_shards(
    lm: nn.Module,
    files: WeightFiles,
    weights: WeightMap,
    dtype: torch.dtype,
    device: torch.device,
    partitioning: Partitioning,
    bucket_bytes: int,
) -> nn.Module:
    """Give a model of shards its weights, in place: rank 0 reads, a bucket of parameters is whole at a time."""
    named = list(lm.named_parameters())
    sizes = [partitioning.shape(parameter).numel() * dtype.itemsize for _, parameter in named]
    for indices in split_buckets(sizes, bucket_bytes):
        chosen = [named[i] for i in indices]
        with partitioning.gathered([parameter for _, parameter in chosen]):
            if partitioning.rank == 0:
                for name, parameter in chosen:
                    parameter.copy_(_read(files, weights, name))
    parameters = dict(named)
    for name, buffer in stock_tensors(lm).items():
        if name not in parameters:
            value = torch.empty(buffer.shape, dtype=_dtype_of(lm, name, dtype), device=device)
            _put(lm, name, value.copy_(_read(files, weights, name)))
    compute_buffers(lm, device)
    return lm.eval()


def _read(files: WeightFiles, weights: WeightMap, name: str) -> torch.Tensor:
    origin = weights.stock(name)
    return origin.make([files.read(original) for original in origin.names])


def _dtype_of(lm: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Router corrections and their like stay in float32, as transformers has it."""
    strict = getattr(lm, "_keep_in_fp32_modules_strict", None) or ()
    return torch.float32 if any(part in name.split(".") for part in strict) else dtype


def _put(lm: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(lm.get_submodule(owner), leaf, value)


def compute_buffers(lm: nn.Module, device: torch.device) -> None:
    """Buffers that are not saved (rotary frequencies), computed by the modules themselves, in their own dtype."""
    saved = lm.state_dict(keep_vars=True).keys()
    owners = {name.rpartition(".")[0] for name, _ in lm.named_buffers() if name not in saved}
    for owner in sorted(owners):
        module = lm.get_submodule(owner)
        config = getattr(module, "config", None)
        if config is None:
            raise ModelError(f"{owner} ({type(module).__name__}) has unsaved buffers and no config to compute them by")
        for leaf, buffer in type(module)(config).named_buffers(recurse=False):
            setattr(module, leaf, buffer.to(device))


def tied_copies(lm: nn.Module, names: Iterable[str], weights: WeightMap) -> dict[str, str]:
    """Those original `names` that hold a tied parameter a second time → the stock parameter that they repeat."""
    tied = getattr(lm, "all_tied_weights_keys", None) or {}
    expected = set(weights.original_names(stock_tensors(lm))) if tied else set()
    found = {}
    for name in names if tied else ():
        parts = weights.original(name).names
        if name not in expected and len(parts) == 1 and parts[0] in {*tied, *tied.values()}:
            found[name] = tied.get(parts[0], parts[0])
    return found


def check_tied(files: WeightFiles, weights: WeightMap, copies: Mapping[str, str]) -> None:
    """copies: of `tied_copies`. Raises ModelError for one that is not the equal of what it repeats; only these are read."""
    for copy, stock in copies.items():
        source = files.read(weights.stock(stock).names[0])
        if not torch.equal(files.read(copy).to(source.dtype), source):
            raise ModelError(
                f"{files.folder}: config.json says that input and output embeddings are one (tied), and {copy} differs from "
                'the input embedding. Set "tie_word_embeddings": false there if both are meant'
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
