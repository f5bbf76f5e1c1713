"""The policy: a stock causal LM read as a denoiser. One forward for rollout, learner and evaluation."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlpipe.models.attention import AttentionPlan
from rlpipe.models.spec import DiffusionSpec

HEAD_CHUNK = 2048  # rows of the LM head at a time: bounds the [rows, vocabulary] float32 tensor


class DiffusionLM(nn.Module):
    """A transformers `…ForCausalLM` in `rlpipe` attention, with its spec.

    Calling it scores tokens (the learner's forward); `hidden` and `logits` are what the sampler uses.
    """

    def __init__(self, lm: nn.Module, spec: DiffusionSpec):
        super().__init__()
        self.lm = lm
        self.spec = spec
        self.forbidden = list(spec.forbidden_ids)
        self.provenance = None  # of a loaded model: what `rlpipe.models.loading` needs to hand it back the way it came

    @property
    def device(self) -> torch.device:
        return next(self.lm.parameters()).device

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """input_ids, position_ids int64 [N, T] → last hidden state [N, T, d]."""
        return self.lm.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, plan=plan).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [M, d] → float32 logits [M, V]; forbidden ids are -inf."""
        logits = self.lm.lm_head(hidden).float()
        logits[:, self.forbidden] = float("-inf")
        return logits

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        plan: AttentionPlan,
        index: torch.Tensor,
        targets: torch.Tensor,
        temperature: float = 1.0,
        entropy: str = "none",
        entropy_temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Score `targets` int64 [M] at flat positions `index` int64 [M] of the [N, T] input.

        Returns float32 log-probabilities [M] at the temperature, and entropies [M] in nats if `entropy` is 'value' (without
        gradient) or 'grad' (with), None if it is 'none'. 'right': with gradient, at `entropy_temperature`, and 0 where the most
        likely token is not the target.
        """
        hidden = self.hidden(input_ids, position_ids, plan).flatten(0, 1)[index]
        settings = (temperature, entropy, entropy_temperature)
        parts = []
        for start in range(0, max(len(index), 1), HEAD_CHUNK):
            rows, wanted = hidden[start : start + HEAD_CHUNK], targets[start : start + HEAD_CHUNK]
            if torch.is_grad_enabled() and len(index) > HEAD_CHUNK:
                parts.append(checkpoint(self._score, rows, wanted, *settings, use_reentrant=False))
            else:
                parts.append(self._score(rows, wanted, *settings))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if entropy != "none" else None

    def _score(self, hidden, targets: torch.Tensor, temperature: float, entropy: str, entropy_temperature: float):
        logits = self.logits(hidden)
        logp = torch.log_softmax(logits / temperature, dim=-1)
        chosen = logp.gather(1, targets.unsqueeze(1)).squeeze(1)
        if entropy == "none":
            return chosen, None
        with torch.set_grad_enabled(entropy != "value" and torch.is_grad_enabled()):
            if entropy == "right":
                right = logits.argmax(-1) == targets
                return chosen, right * _entropy(torch.log_softmax(logits / entropy_temperature, dim=-1))
            return chosen, _entropy(logp)


def _entropy(logp: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [M, V] → nats [M]; 0 · (-inf) counts as 0."""
    return -(logp.exp() * logp.clamp_min(-1e30)).sum(-1)
