"""Weights on the move: named tensors packed into byte buckets, each with a digest that is checked before its bytes are used.

A bucket is a flat uint8 tensor, on any device, so that it travels in any dtype by any carrier. Its layout is planned before a
byte is there: whoever receives it can check names, shapes and types first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from rlpipe.errors import WeightMismatch

ALIGN = 64  # bytes: tensors start at multiples of it, so that every dtype can be read where it lies
ROW = 2**16  # words of a digest's row


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter: where its bytes lie. shape () of a scalar is allowed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int
    nbytes: int


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


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tensor lies where. sizes: bytes of each bucket, multiples of ALIGN."""

    entries: tuple[Entry, ...] = ()
    sizes: tuple[int, ...] = ()

    @classmethod
    def plan(cls, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], bucket_bytes: int) -> Layout:
        """(name, dtype, shape) in order → buckets of at most bucket_bytes; a larger tensor has one for itself."""
        named = list(tensors)
        sizes = [_nbytes(dtype, shape) for _, dtype, shape in named]
        entries, totals = [], []
        for number, indices in enumerate(split_buckets([_padded(size) for size in sizes], bucket_bytes)):
            offset = 0
            for index in indices:
                name, dtype, shape = named[index]
                entries.append(Entry(name, str(dtype).removeprefix("torch."), tuple(shape), number, offset, sizes[index]))
                offset += _padded(sizes[index])
            totals.append(offset)
        return cls(tuple(entries), tuple(totals))

    @property
    def nbytes(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        """Bytes of the largest bucket."""
        return max(self.sizes, default=0)

    def buckets(self) -> list[list[Entry]]:
        """The entries of each bucket, in order."""
        found: list[list[Entry]] = [[] for _ in self.sizes]
        for entry in self.entries:
            found[entry.bucket].append(entry)
        return found


def _nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    return dtype.itemsize * int(np.prod(list(shape), dtype=np.int64))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


@torch.no_grad()
def pack(tensors: Iterable[torch.Tensor], entries: Sequence[Entry], into: torch.Tensor) -> None:
    """Copy tensors to their places in a bucket, uint8 [n] on any device; what lies between them becomes 0."""
    for tensor, entry in zip(tensors, entries, strict=True):
        view(entry, into).copy_(tensor)
        into[entry.offset + entry.nbytes : entry.offset + _padded(entry.nbytes)] = 0


def view(entry: Entry, bucket: torch.Tensor) -> torch.Tensor:
    """A tensor where it lies in its bucket, not copied."""
    data = bucket[entry.offset : entry.offset + entry.nbytes]
    return data.view(getattr(torch, entry.dtype)).view(entry.shape)


def digest(bucket: torch.Tensor) -> int:
    """64-bit hash of a bucket, uint8 [n], n a multiple of 8; the same on every device, where the bytes are.

    Multilinear hashing (Lemire and Kaser, arXiv 1202.4961) of 64-bit words: Σ word · weight modulo 2⁶⁴ by rows of ROW words,
    and Σ row · weight over the rows. Unlike there every weight is odd and nothing is shifted out, so that a change of any one
    word always shows; it guards against accidents, not against forgers.
    """
    words = bucket.view(torch.int64)
    weights = _weights(bucket.device)
    rows = torch.stack([(part * weights[: len(part)]).sum() for part in words.split(ROW)])
    total = (rows * _row_weights(len(rows)).to(rows.device)).sum()
    return (int(total) + len(words)) % 2**64


def combined(digests: Iterable[int], base: str = "") -> str:
    """The checksum of an update, 32 hex digits: BLAKE2b over its buckets' digests, and over what it builds on."""
    hashed = hashlib.blake2b(base.encode(), digest_size=16)
    for value in digests:
        hashed.update(value.to_bytes(8, "little"))
    return hashed.hexdigest()


@cache
def _weights(device: torch.device) -> torch.Tensor:
    return _odd_numbers(0, ROW).to(device)


def _row_weights(rows: int) -> torch.Tensor:
    return _odd_numbers(ROW, rows)


def _odd_numbers(start: int, count: int) -> torch.Tensor:
    """int64 [count]: SplitMix64 of a counter (Steele, Lea and Flood, OOPSLA 2014), made odd."""
    with np.errstate(over="ignore"):
        x = (np.arange(start + 1, start + count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(x.view(np.int64))


def check_names(layout: Layout, tensors: dict[str, torch.Tensor], version: int) -> None:
    """Raises WeightMismatch unless the layout has just these names, with their shapes and dtypes."""
    entries = {entry.name: entry for entry in layout.entries}
    if entries.keys() != tensors.keys():
        odd = sorted(entries.keys() ^ tensors.keys())
        raise WeightMismatch(f"version {version} and this model differ in {len(odd)} parameters, first {odd[0]}")
    for name, tensor in tensors.items():
        here = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        sent = (entries[name].shape, entries[name].dtype)
        if here != sent:
            raise WeightMismatch(f"{name}: version {version} has {_shape(*sent)}, the model {_shape(*here)}")


def _shape(shape: tuple[int, ...], dtype: str) -> str:
    return f"shape {shape} of {dtype}"


def tensor_of(entry: Entry, bucket: np.ndarray) -> torch.Tensor:
    """One parameter out of its bucket, copied."""
    data = bucket[entry.offset : entry.offset + entry.nbytes]
    return torch.from_numpy(data.copy()).view(getattr(torch, entry.dtype)).view(entry.shape)
