"""Weights on the move: named parameters packed into byte buckets, with a version and a checksum.

A bucket is a flat uint8 numpy array, so that it travels through the object store without a copy and in any dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlpipe.errors import WeightMismatch


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter: where its bytes lie. shape () of a scalar is allowed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a weight update contains. checksum: BLAKE2b over all buckets in order."""

    version: int
    entries: tuple[Entry, ...]
    checksum: str

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def split_buckets(sizes: Sequence[int], bucket_bytes: int) -> Iterator[list[int]]:
    """Indices of consecutive parameters (sizes in bytes), at most bucket_bytes together; a larger one stands alone."""
    bucket: list[int] = []
    filled = 0
    for index, size in enumerate(sizes):
        if bucket and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(index)
        filled += size
    if bucket:
        yield bucket


def fill_bucket(named: Iterable[tuple[str, torch.Tensor]], bucket: int) -> tuple[np.ndarray, list[Entry]]:
    """Copy tensors into one bucket → (uint8 [n], entries)."""
    pieces, entries, offset = [], [], 0
    for name, tensor in named:
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(Entry(name, dtype, tuple(tensor.shape), bucket, offset, data.nbytes))
        pieces.append(data)
        offset += data.nbytes
    return np.concatenate(pieces), entries


def checksum(buckets: Iterable[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for bucket in buckets:
        digest.update(memoryview(np.ascontiguousarray(bucket)))
    return digest.hexdigest()


@torch.no_grad()
def load_buckets(module: torch.nn.Module, manifest: Manifest, buckets: Sequence[np.ndarray]) -> None:
    """Copy a weight update into `module` in place, so that whatever captured its storage stays valid.

    Raises WeightMismatch, before anything is changed, if the bytes or the names and shapes are not the expected ones.
    """
    found = checksum(buckets)
    if found != manifest.checksum:
        raise WeightMismatch(
            f"weights of version {manifest.version} arrived damaged: checksum {found}, expected {manifest.checksum}"
        )
    parameters = dict(module.named_parameters())
    names = {entry.name for entry in manifest.entries}
    if names != parameters.keys():
        odd = sorted(names ^ parameters.keys())
        raise WeightMismatch(f"version {manifest.version} and this model differ in {len(odd)} parameters, first {odd[0]}")
    for entry in manifest.entries:
        shape = tuple(parameters[entry.name].shape)
        if shape != entry.shape:
            raise WeightMismatch(f"{entry.name}: version {manifest.version} has shape {entry.shape}, the model {shape}")
    for entry in manifest.entries:
        parameters[entry.name].copy_(tensor_of(entry, buckets[entry.bucket]))


def tensor_of(entry: Entry, bucket: np.ndarray) -> torch.Tensor:
    """One parameter out of its bucket, copied."""
    data = bucket[entry.offset : entry.offset + entry.nbytes]
    return torch.from_numpy(data.copy()).view(getattr(torch, entry.dtype)).view(entry.shape)
