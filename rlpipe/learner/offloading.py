"""A learner's turn is over: all that it keeps on its device moves to the host, and later back to where it was.

This works on storages, in place: each is copied and shrunk to nothing, and grown and filled again. Every view of it (a
parameter, its shard, DeepSpeed's flat buffers and their fragments) stays what it is, so ZeRO 0 to 3 and any optimizer are the
same to it. DeepSpeed's own `offload_states` (0.19.8) would not do: at ZeRO 0 there is none, and at ZeRO 3 it refuses
every optimizer but its FusedAdam, where we train with torch's AdamW.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

OPAQUE = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, logging.Logger, weakref.ref)
CONTAINERS = (list, tuple, set, frozenset, deque)


class Offload:
    """What one rank has moved to the host. Not thread-safe; nothing of the learner may be used in between."""

    def __init__(self):
        self._held: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._spare: dict[int, torch.UntypedStorage] = {}  # host memory of the last time: pinning it anew would take seconds

    def sleep(self, owner: Any, device: torch.device, keep: Any = ()) -> int:
        """Move the storages on `device` of all tensors that can be reached from `owner` to the host, but not those reached from
        `keep`; returns the bytes that are free now. May be called again, for what was kept."""
        kept = {storage._cdata for storage in storages_of(keep, device)}
        freed = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for storage in storages_of(owner, device):
            if storage._cdata in kept or storage._cdata in self._held or not storage.resizable():
                continue
            host = self._host(storage, pinned=device.type == "cuda")
            host.copy_(storage)
            freed += storage.nbytes()
            storage.resize_(0)
            self._held[storage._cdata] = (storage, host)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return freed

    def wake(self) -> int:
        """Everything back to where it was; returns the bytes."""
        for storage, host in self._held.values():
            storage.resize_(host.nbytes())
            storage.copy_(host)
        self._spare = {key: host for key, (_, host) in self._held.items()}
        self._held = {}
        return sum(host.nbytes() for host in self._spare.values())

    @property
    def asleep(self) -> bool:
        return bool(self._held)

    def _host(self, storage: torch.UntypedStorage, pinned: bool) -> torch.UntypedStorage:
        spare = self._spare.pop(storage._cdata, None)
        if spare is not None and spare.nbytes() == storage.nbytes():
            return spare
        return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned).untyped_storage()


def storages_of(owner: Any, device: torch.device) -> Iterator[torch.UntypedStorage]:
    """Different storages on `device`, not empty, of the tensors that can be reached from `owner`."""
    seen: set[int] = set()
    for tensor in tensors_of(owner):
        if tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index):
            continue
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage


def tensors_of(owner: Any) -> Iterator[torch.Tensor]:
    """Every tensor in attributes and containers below `owner`, gradients and tensors' own attributes included; not what only
    functions hold."""
    stack, seen, alive = [owner], set(), []
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(found, OPAQUE):
            continue
        seen.add(id(found))
        alive.append(found)  # so that no id is given away twice on the walk
        if isinstance(found, torch.Tensor):
            yield found
            if found.is_leaf and found.grad is not None:
                stack.append(found.grad)
        if isinstance(found, dict):
            stack += [*found.keys(), *found.values()]
        elif isinstance(found, CONTAINERS):
            stack += found
        stack += _attributes(found)


def _attributes(found: Any) -> list[Any]:
    named = list(getattr(found, "__dict__", {}).values())
    slots = [name for kind in type(found).__mro__ for name in getattr(kind, "__slots__", ()) if not name.startswith("__")]
    return named + [getattr(found, name) for name in slots if hasattr(found, name)]
