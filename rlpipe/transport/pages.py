"""Host memory for buckets that can be given back while somebody still refers to it."""

from __future__ import annotations

import mmap

import torch


class Pages:
    """tensor: uint8 [nbytes] on the host. Ray holds on to what it was given until it gets the next, and gloo to what it sent
    last: `release` gives the memory itself back to the system all the same."""

    def __init__(self, nbytes: int):
        self._map = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:nbytes]

    def release(self) -> None:
        """What lies there is gone; the memory can be filled again."""
        self._map.madvise(mmap.MADV_DONTNEED)
