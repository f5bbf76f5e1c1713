"""Bytes of tensors that a piece of work makes and holds, counted as they come and go."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """A context. peak: the largest number of bytes of storages that were alive at a time and that torch's operators returned
    first within it, on any device. What is made outside torch (the object store's memory, a mapped file) does not count."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in _tensors(args) + _tensors((kwargs or {}).values())}
        found = function(*args, **kwargs or {})
        for tensor in _tensors(found if isinstance(found, (tuple, list)) else (found,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._held:
                self._hold(storage)
        return found

    def _hold(self, storage) -> None:
        self._held[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage._cdata)

    def _release(self, key: int) -> None:
        self.now -= self._held.pop(key, 0)


def _tensors(values) -> list[torch.Tensor]:
    flat = []
    for value in values:
        flat += _tensors(value) if isinstance(value, (tuple, list)) else [value]
    return [value for value in flat if isinstance(value, torch.Tensor)]
