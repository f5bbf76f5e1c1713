"""Reducers: the weight of every unit of the ratio, fixed over the whole update batch before its first backward pass.

The loss is Σ weight · per-unit loss, so it adds up over micro-batches, packs and ranks: how the batch is split changes nothing,
and no mean of means can creep in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlpipe.errors import ConfigError
from rlpipe.objectives.units import Units

NORMALIZERS = (
    "response_length", "row_mean", "step_mean", "step_sum", "sequence_mean", "response_sum", "token_mean", "length_mean",
    "weight_mean", "constant",
)  # fmt: skip
KL_NORMALIZERS = (*NORMALIZERS, "row_sum", "length_sum")


def unit_weights(
    units: Sequence[Units], *, normalizer: str, response_lens: Sequence[int], max_tokens: int | None = None
) -> list[np.ndarray]:
    """One float32 array [U] a response: what each of its units counts in the update's loss.

    units and response_lens: of all N responses of the update, on all ranks. Their R rows hold n_row units each; a response
    whose units span rows counts as one row. Where a unit is a token, all of these are per token. Normalizers:

    - response_length: 1 / (R · longest response). TraceRL's published block code (arXiv 2509.06949).
    - row_mean: 1 / (R · n_row). Its published full-attention code.
    - step_mean: the mean over a row's units, then over the response's rows, then over the responses that score any. CJ-GRPO
      (arXiv 2509.23924, as its paper has it; its code agrees when every response commits the same counts).
    - step_sum: the mean over a row's units, the sum over the response's rows, the mean over the responses that score any. MDPO
      (arXiv 2508.13148).
    - response_sum: 1 / the responses that score any. AGRPO (arXiv 2510.04019), whose rows bring their own weights.
    - row_sum: 1 / R. The KL term of TraceRL's full-attention code; not meant for the policy term.
    - sequence_mean: the mean over a response's units, then over the responses that score any (GRPO).
    - token_mean: 1 / all units (DAPO).
    - weight_mean: 1 / the sum of all units' own weights: their weighted mean, for rows that bring such weights (supervised
      training).
    - length_mean: as token_mean, a unit counted as often as it spans tokens, so that a response weighs by its length. SPG
      (arXiv 2510.09541).
    - length_sum: as response_sum, a unit counted so. The KL term of ESPO (arXiv 2512.03759), whose units are per token.
    - constant: 1 / (N · max_tokens) (Dr.GRPO).

    A unit's own weight multiplies all of these and changes no denominator but weight_mean's. A response without units gets an
    empty array. Raises ConfigError for another normalizer, or `constant` without max_tokens; ValueError if units and
    response_lens differ in number.
    """
    if len(units) != len(response_lens):
        raise ValueError(f"units of {len(units)} responses, {len(response_lens)} response lengths")
    if normalizer not in KL_NORMALIZERS:
        raise ConfigError(f"normalizer '{normalizer}' is none of {', '.join(KL_NORMALIZERS)}")
    if normalizer == "constant" and not max_tokens:
        raise ConfigError("normalizer constant divides by rollout.decoder.max_tokens, which was not given")
    weights = _weights(units, normalizer, response_lens, max_tokens)
    return [(weight.astype(np.float32) * own.weight).astype(np.float32) for weight, own in zip(weights, units, strict=True)]


def _weights(units: Sequence[Units], normalizer: str, response_lens: Sequence[int], max_tokens: int | None) -> list[np.ndarray]:
    """float64 weights of all units, before their own."""
    counts = [np.bincount(own.row) for own in units]  # units of each row, per response; rows without any do not count
    rows = [max(np.count_nonzero(count), 1) for count in counts]
    num_rows = sum(int(np.count_nonzero(count)) for count in counts)
    num_units = sum(len(own) for own in units)
    live = sum(len(own) > 0 for own in units)
    if not num_units:
        return [np.zeros(0) for _ in units]
    if normalizer == "row_mean":
        return [1.0 / (num_rows * count[own.row]) for count, own in zip(counts, units, strict=True)]
    if normalizer == "step_mean":
        return [1.0 / (live * n * count[own.row]) for n, count, own in zip(rows, counts, units, strict=True)]
    if normalizer == "step_sum":
        return [1.0 / (live * count[own.row]) for count, own in zip(counts, units, strict=True)]
    if normalizer == "sequence_mean":
        return [np.full(len(own), 1.0 / (live * max(len(own), 1))) for own in units]
    if normalizer == "length_mean":
        tokens = sum(int(own.span.sum()) for own in units)
        return [own.span / tokens for own in units]
    if normalizer == "weight_mean":
        total = sum(float(own.weight.sum(dtype=np.float64)) for own in units)
        return [np.full(len(own), 1.0 / total) for own in units]
    if normalizer == "length_sum":
        return [own.span / live for own in units]
    flat = {
        "response_length": 1.0 / (num_rows * max(response_lens)),
        "row_sum": 1.0 / num_rows,
        "token_mean": 1.0 / num_units,
        "response_sum": 1.0 / live,
        "constant": 1.0 / (len(units) * (max_tokens or 1)),
    }[normalizer]
    return [np.full(len(own), flat) for own in units]
