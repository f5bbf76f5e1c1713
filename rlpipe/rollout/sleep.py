"""A rollout worker's turn is over: it gives its memory away and keeps nothing. Once it is awake its weights are pushed anew.

Weights are not kept on the host: the learner has them. Storages shrink and grow in place, so that whatever refers to a
parameter (joined projections are views of one tensor) is right again once the weights have come.
"""

from __future__ import annotations

import math

import torch

from rlpipe.sampling.engine import Engine


def sleep(engine: Engine) -> int:
    """Release the weights and the cache; returns the bytes that are free now. No session may be open, and nothing may be
    sampled before `wake` and a complete weight update."""
    freed = 0
    if engine.spare is not None:
        freed += sum(storage.untyped_storage().nbytes() for storage in engine.spare.storage)
        engine.spare = None
    for storage, _ in _storages(engine):
        freed += storage.nbytes()
        storage.resize_(0)
    if engine.model.device.type == "cuda":
        torch.cuda.empty_cache()
    return freed


@torch.no_grad()
def wake(engine: Engine) -> int:
    """Make room for the weights again; returns the bytes. They are NaN until an update brings them: what an incomplete one
    leaves out cannot go unnoticed."""
    taken = 0
    for storage, nbytes in _storages(engine):
        if storage.nbytes() < nbytes:
            storage.resize_(nbytes)
            taken += nbytes
    if taken:
        for parameter in engine.model.parameters():
            parameter.fill_(math.nan)
    return taken


def _storages(engine: Engine) -> list[tuple[torch.UntypedStorage, int]]:
    """Different storages of the parameters, and the bytes that their parameters need."""
    found: dict[int, torch.UntypedStorage] = {}
    needed: dict[int, int] = {}
    for parameter in engine.model.parameters():
        storage = parameter.untyped_storage()
        found.setdefault(storage._cdata, storage)
        end = (parameter.storage_offset() + parameter.numel()) * parameter.element_size()
        needed[storage._cdata] = max(end, needed.get(storage._cdata, 0))
    return [(storage, needed[key]) for key, storage in found.items()]
