"""One pass over the logits of the masked rows: what was drawn and how sure the model was."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RowStatistics(NamedTuple):
    """All [M], one row a masked candidate position.

    token int64 (drawn) · logp float32 under the sampling distribution (0 when greedy) · logp_t1 float32 at temperature 1 ·
    p_token float32 = exp(logp_t1) · p_max float32, p_second float32 largest and second-largest probability at temperature 1 ·
    entropy float32 in nats at temperature 1.
    """

    token: torch.Tensor
    logp: torch.Tensor
    logp_t1: torch.Tensor
    p_token: torch.Tensor
    p_max: torch.Tensor
    p_second: torch.Tensor
    entropy: torch.Tensor


def row_statistics(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> RowStatistics:
    """logits float32 [M, V] (-inf: forbidden), noise float64 [M] in [0, 1); temperature 0 is greedy (lowest id wins ties)."""
    logp_t1 = torch.log_softmax(logits, dim=-1)
    probs = logp_t1.exp()
    top = probs.topk(2, dim=-1).values
    entropy = -(probs * logp_t1.clamp_min(-1e30)).sum(-1)
    if temperature == 0:
        token = logits.argmax(-1)
        logp = torch.zeros(len(logits), device=logits.device)
    else:
        tempered = logp_t1 if temperature == 1.0 else torch.log_softmax(logits / temperature, dim=-1)
        token = inverse_cdf(tempered.exp(), noise)
        logp = tempered.gather(1, token.unsqueeze(1)).squeeze(1)
    chosen = logp_t1.gather(1, token.unsqueeze(1)).squeeze(1)
    return RowStatistics(token, logp, chosen, chosen.exp(), top[:, 0], top[:, 1], entropy)


def inverse_cdf(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw from float32 [M, V] with float64 uniforms [M]. A token of probability 0 is never drawn.

    The running sum is float64: in float32 its rounding would exceed the probability of rare tokens in a large vocabulary.
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, (noise * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1).clamp_max(probs.shape[1] - 1)
