"""A model that is too large for one GPU, over several GPUs of one process: its layers in contiguous runs.

The first device also has the embedding, the final norm and the head, so that canvases and statistics stay there; hidden states
go from device to device where a run ends, as in accelerate's `dispatch_model`. One device computes at a time: this makes a
model fit, and not faster. It is for sampling, through `rlpipe.models.executor`; a learner shards with ZeRO 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlpipe.errors import ModelError
from rlpipe.models.executor import Executor
from rlpipe.models.loading import load_model
from rlpipe.models.policy import DiffusionLM


def load_to_sample(path: str | Path, dtype: str = "float32", **settings: Any) -> DiffusionLM:
    """`load_model` on all GPUs that this process sees: one of them, several that share its layers (by way of host memory, which
    holds the whole model once), or the CPU."""
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if len(gpus) < 2:
        return load_model(path, dtype, device=gpus[0] if gpus else "cpu", **settings)
    return spread(load_model(path, dtype, **settings), gpus)


def spread(model: DiffusionLM, devices: Sequence[torch.device]) -> DiffusionLM:
    """Move a model, in place, from where it was loaded (the host, as a rule) to the devices. Raises ModelError for an
    architecture whose stock forward is needed, and for more devices than layers."""
    lm, layers = model.lm, model.lm.model.layers
    if not Executor.knows(lm):
        raise ModelError(f"{type(lm).__name__} cannot be spread over {len(devices)} GPUs; set rollout.gpus=1")
    if len(devices) > len(layers):
        raise ModelError(f"a model of {len(layers)} layers cannot be spread over {len(devices)} GPUs; set rollout.gpus lower")
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    places = split_layers(sizes, sum(p.nbytes for p in lm.parameters()) - sum(sizes), len(devices))
    for name, child in lm.model.named_children():
        if name != "layers":
            child.to(devices[0])
    lm.lm_head.to(devices[0])
    for layer, place in zip(layers, places, strict=True):
        layer.to(devices[place])
    return model


def split_layers(sizes: Sequence[int], outside: int, devices: int) -> list[int]:
    """The device of each layer: contiguous, so that the fullest device has as little as possible. sizes: bytes of the layers;
    outside: what the first device has besides."""
    low, high = max([outside, *sizes]), outside + sum(sizes)
    while low < high:  # the smallest load that `devices` can be limited to
        limit = (low + high) // 2
        if _filled(sizes, outside, limit)[-1] < devices:
            high = limit
        else:
            low = limit + 1
    return _filled(sizes, outside, low)


def _filled(sizes: Sequence[int], outside: int, limit: int) -> list[int]:
    """Devices filled one after the other up to the limit."""
    places, device, load = [], 0, outside
    for size in sizes:
        if load + size > limit:
            device, load = device + 1, 0
        places.append(device)
        load += size
    return places
