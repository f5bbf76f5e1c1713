"""ZeRO 3 from the first byte on: models that are made, filled and copied in shards, so that no rank ever holds a whole one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from rlpipe.config import LearnerConfig
from rlpipe.learner.engine import deepspeed_config, import_deepspeed


class Partitioned:
    """What `load_model` needs to make parameters that are shards. The process group must be there; the model then goes to
    `Engine` as any other."""

    def __init__(self, config: LearnerConfig):
        self.deepspeed, self.config = import_deepspeed(), config
        self.rank = torch.distributed.get_rank()

    def creating(self, dtype: torch.dtype):
        """Context: what modules inside make is sharded at once."""
        settings = deepspeed_config(self.config, dtype)
        # Its linear layer of its own is for sharding modules that are whole; it would stay in torch afterwards.
        return self.deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype, mem_efficient_linear=False)

    def gathered(self, parameters: Sequence[nn.Parameter]):
        """Context: the parameters are whole, and what rank 0 writes into them stays. All ranks must enter."""
        return self.deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape


def whole_size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also while a rank holds only its shard."""
    return getattr(parameter, "ds_numel", parameter.numel())


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that is never trained; of a sharded model, shard by shard. All ranks must call."""
    sharded = {id(p): p for p in model.parameters() if hasattr(p, "ds_id")}
    if not sharded:
        return copy.deepcopy(model).requires_grad_(False).eval()
    gathered = import_deepspeed().zero.GatheredParameters
    held = copy.deepcopy(model, dict(sharded))  # the memo: structure and buffers are new, parameters still the same ones
    fresh: dict[int, nn.Parameter] = {}
    for key, parameter in sharded.items():
        with gathered([parameter]):
            fresh[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        parameter.convert_to_zero_parameters([fresh[key]])
    for module in held.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in fresh:
                module._parameters[name] = fresh[id(parameter)]
    return held.requires_grad_(False).eval()
