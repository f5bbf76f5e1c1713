"""One look at the logits of the masked rows: what was drawn and how sure the model was."""

from __future__ import annotations

from typing import NamedTuple

import torch

CHUNK = 256  # columns summed at a time by the inverse CDF of a large vocabulary


class RowStatistics(NamedTuple):
    """All [M], one row a masked candidate position.

    token int64 (drawn) · logp float32 under the sampling distribution (0 when greedy) · logp_t1 float32 of the model at
    temperature 1 · p_token, p_max, p_second float32: probability of the token, the largest, the second-largest · entropy
    float32 in nats. The last four are those of the model at temperature 1, or of the sampling distribution where the decoder
    says so (`confidence: sampler`). p_second and entropy are NaN unless asked for.
    """

    token: torch.Tensor
    logp: torch.Tensor
    logp_t1: torch.Tensor
    p_token: torch.Tensor
    p_max: torch.Tensor
    p_second: torch.Tensor
    entropy: torch.Tensor


def row_statistics(
    logits: torch.Tensor,
    noise: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    raw: torch.Tensor | None = None,
    top_p: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    needs: frozenset[str] = frozenset(("p_second", "entropy")),
    confidence: str = "model",
) -> RowStatistics:
    """logits float32 [M, V] (-inf: forbidden), noise float64 [M] in [0, 1); temperature 0 is greedy (lowest id wins ties).

    temperature, top_p, top_k: one for all rows, or [M]. top_k keeps ties, top_p the smallest set of most likely tokens that
    reaches it, after temperature and top_k (as SDAR and Dream). raw float32 [M, V]: the model's logits where `logits` are
    biased or fused; logp_t1 is theirs.
    """
    if not isinstance(temperature, torch.Tensor) and temperature == 0 and raw is None and "entropy" not in needs:
        return _greedy(logits, needs)
    model = torch.log_softmax(logits, -1)
    law = _sampling_law(model, temperature, top_p, top_k)
    token, logp = _draw(logits, law, noise, temperature)
    at_token = token.unsqueeze(1)
    logp_t1 = (model if raw is None else torch.log_softmax(raw, -1)).gather(1, at_token).squeeze(1)
    view = law if confidence == "sampler" else model
    nothing = torch.full((), float("nan"), device=logits.device).expand(len(logits))
    p_second, entropy = nothing, nothing
    if "p_second" in needs:
        top = view.topk(2, dim=-1).values.exp()
        p_max, p_second = top[:, 0], top[:, 1]
    else:
        p_max = view.amax(-1).exp()
    if "entropy" in needs:
        entropy = -(view.exp() * view.clamp_min(-1e30)).sum(-1)  # 0 · (-inf) counts as 0
    return RowStatistics(token, logp, logp_t1, view.gather(1, at_token).squeeze(1).exp(), p_max, p_second, entropy)


def token_statistics(
    logits: torch.Tensor, raw: torch.Tensor, token: torch.Tensor, temperature: torch.Tensor, confidence: str
) -> RowStatistics:
    """Statistics of tokens int64 [M] that somebody else chose; logits (biased) and raw float32 [M, V], temperature float32 [M].

    logp is that of the sampling distribution without top_k and top_p, at temperature 1 where rows are greedy: it says what the
    model thinks of a token that it did not draw. -inf for ids outside the vocabulary. p_max, p_second and entropy are NaN.
    """
    known = (token >= 0) & (token < logits.shape[1])
    at_token = torch.where(known, token, 0).unsqueeze(1)
    scale = torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
    pick = lambda law: torch.where(known, torch.log_softmax(law, -1).gather(1, at_token).squeeze(1), float("-inf"))  # noqa: E731
    logp, logp_t1 = pick(logits / scale), pick(raw)
    nothing = torch.full((), float("nan"), device=logits.device).expand(len(logits))
    p_token = (logp if confidence == "sampler" else pick(logits)).exp()
    return RowStatistics(token, logp, logp_t1, p_token, nothing, nothing, nothing)


def _greedy(logits: torch.Tensor, needs: frozenset[str]) -> RowStatistics:
    """What greedy decoding looks at, without a [M, V] tensor of its own: the most likely token is the drawn one."""
    total = logits.logsumexp(-1)
    nothing = torch.full((), float("nan"), device=logits.device).expand(len(logits))
    second = (logits.topk(2, dim=-1).values[:, 1] - total).exp() if "p_second" in needs else nothing
    best = logits.max(-1)
    logp = best.values - total
    return RowStatistics(best.indices, torch.zeros_like(logp), logp, logp.exp(), logp.exp(), second, nothing)


def _draw(logits, law, noise, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """(token int64 [M], its log-probability under `law`, 0 where greedy)."""
    per_row = isinstance(temperature, torch.Tensor)
    if not per_row and temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    token = inverse_cdf(law.exp(), noise)
    logp = law.gather(1, token.unsqueeze(1)).squeeze(1)
    if not per_row:
        return token, logp
    greedy = temperature == 0
    return torch.where(greedy, logits.argmax(-1), token), torch.where(greedy, 0.0, logp)


def _sampling_law(model: torch.Tensor, temperature, top_p, top_k) -> torch.Tensor:
    """Log-probabilities [M, V] of temperature, then top_k, then top_p, renormalised; greedy rows keep temperature 1."""
    per_row = isinstance(temperature, torch.Tensor)
    if per_row:
        scale = torch.where(temperature == 0, 1.0, temperature).unsqueeze(1)
        law = torch.log_softmax(model / scale, -1)
    else:
        law = model if temperature in (0, 1) else torch.log_softmax(model / temperature, -1)
    kept = support(law, top_p, top_k)
    return law if kept is None else torch.log_softmax(law.masked_fill(~kept, float("-inf")), -1)


def support(law: torch.Tensor, top_p: float | torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor | None:
    """bool [M, V]: tokens that top_k and top_p leave of `law` (log-probabilities); None if they leave all."""
    some_k = isinstance(top_k, torch.Tensor) or top_k > 0
    some_p = isinstance(top_p, torch.Tensor) or top_p < 1
    if not (some_k or some_p):
        return None
    ordered = law.sort(dim=-1, descending=True).values
    floor = torch.full((len(law), 1), float("-inf"), dtype=law.dtype, device=law.device)
    if some_k:
        wanted = torch.as_tensor(top_k, device=law.device).expand(len(law)).unsqueeze(1)
        kth = ordered.gather(1, (wanted - 1).clamp(0, law.shape[1] - 1))
        floor = torch.where(wanted > 0, kth, floor)
    if some_p:
        mass = torch.where(ordered >= floor, ordered, float("-inf")).softmax(-1).cumsum(-1, dtype=torch.float64)
        limit = torch.as_tensor(top_p, dtype=torch.float64, device=law.device).expand(len(law)).unsqueeze(1)
        within = (mass < limit - 1e-9).sum(-1, keepdim=True).clamp_max(law.shape[1] - 1)  # index of the last one kept
        floor = torch.maximum(floor, torch.where(limit < 1, ordered.gather(1, within), float("-inf")))
    return law >= floor


def inverse_cdf(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw from float32 [M, V] with float64 uniforms [M]. A token of probability 0 is never drawn.

    Running sums are float64: in float32 their rounding would exceed the probability of rare tokens in a large vocabulary. A
    large vocabulary is summed by chunks first, so that only one of them needs a running sum.
    """
    rows, vocabulary = probs.shape
    if vocabulary <= 4 * CHUNK:
        return _search(probs, noise, None)
    padded = torch.nn.functional.pad(probs, (0, -vocabulary % CHUNK)).view(rows, -1, CHUNK)
    mass = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = noise * mass[:, -1]
    chunk = torch.searchsorted(mass, target.unsqueeze(1), right=True).squeeze(1)
    chunk = torch.minimum(chunk, _last(padded.amax(-1)))
    below = torch.where(chunk > 0, mass.gather(1, (chunk - 1).clamp_min(0).unsqueeze(1)).squeeze(1), 0.0)
    inside = padded[torch.arange(rows, device=probs.device), chunk]
    return chunk * CHUNK + _search(inside, target - below, inside)


def _search(probs: torch.Tensor, noise: torch.Tensor, absolute: torch.Tensor | None) -> torch.Tensor:
    """Index of the first running sum above the target (noise · total, or noise itself); the last possible token at the end."""
    cdf = probs.cumsum(-1, dtype=torch.float64)
    target = noise if absolute is not None else noise * cdf[:, -1]
    found = torch.searchsorted(cdf, target.unsqueeze(1), right=True).squeeze(1)
    return torch.minimum(found, _last(probs))


def _last(probs: torch.Tensor) -> torch.Tensor:
    """int64 [M]: the last column that is possible; rounding may put a target behind it."""
    return torch.where(probs > 0, torch.arange(probs.shape[1], device=probs.device), 0).amax(-1)
