"""The diffusion value model: a backbone of its own and a scalar head, read where the policy predicts a token."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rlpipe.errors import ModelError
from rlpipe.models.attention import AttentionPlan
from rlpipe.models.policy import DiffusionLM

HEAD_FILE = "value_head.safetensors"


class ValueModel(nn.Module):
    """Values of noisy states, one a token to be predicted there: the return expected of the response, in units of the reward.

    The head is a linear map without bias from the last hidden state and starts at zero, so that the first advantages are the
    rewards themselves. Source: TraceRL's value model, arXiv 2509.06949.
    """

    def __init__(self, policy: DiffusionLM):
        """Takes over the weights of `policy`. Its LM head is frozen and stays, so that what is saved loads like any model."""
        super().__init__()
        self.lm, self.spec, self.provenance = policy.lm, policy.spec, policy.provenance
        if self.lm.lm_head.weight is not self.lm.model.embed_tokens.weight:
            self.lm.lm_head.requires_grad_(False)
        self.head = nn.Linear(self.lm.config.hidden_size, 1, bias=False, dtype=self.lm.dtype)
        nn.init.zeros_(self.head.weight)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, plan: AttentionPlan, index: torch.Tensor
    ) -> torch.Tensor:
        """Float32 values [M] at flat positions `index` int64 [M] of the [N, T] input."""
        hidden = self.lm.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, plan=plan).last_hidden_state
        return self.head(hidden.flatten(0, 1)[index]).float().squeeze(1)

    def load_head(self, folder: Path) -> None:
        """The head of a saved value model, if the folder has one. Raises ModelError if it does not fit."""
        from safetensors.torch import load_file

        path = Path(folder) / HEAD_FILE
        if not path.is_file():
            return
        try:
            self.head.load_state_dict(load_file(path))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{path}: the value head does not fit this backbone: {error}") from error
