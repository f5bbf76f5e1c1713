"""Counter-based noise: one uniform per (seed, position, step), and nothing else.

A sample then depends neither on its neighbours in a batch, nor on its slot, nor on the number of workers. One uniform and
inverse-CDF sampling is enough: a position is drawn at most once a step.
"""

from __future__ import annotations

import hashlib

import torch

TOKEN, POSITION_SCORE, ORDER, EDIT = range(4)  # streams

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def sample_seed(run_seed: int, uid: str, sample: int) -> int:
    """Seed of one response: a 63-bit hash of the run's seed, the prompt's uid and the sample's index."""
    digest = hashlib.blake2b(f"{run_seed}\x00{uid}\x00{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor, stream: int = TOKEN) -> torch.Tensor:
    """float64 in [0, 1) for broadcastable int64 tensors; the SplitMix64 finaliser chained over the three counters."""
    state = _mix(seed + stream)
    state = _mix(state + position * _GOLDEN)
    state = _mix(state + step * _GOLDEN)
    return _shift(state, 11).double() * 2.0**-53


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = z + _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right of signed int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
