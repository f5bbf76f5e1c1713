"""Reducers: the weight of every scored token, fixed over the whole update batch before its first backward pass.

The loss is Σ weight · per-token loss, so it adds up over micro-batches, packs and ranks: how the batch is split
changes nothing, and no mean of means can creep in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlpipe.errors import ConfigError
from rlpipe.objectives.rows import Rows

NORMALIZERS = ("response_length", "row_mean", "step_mean", "sequence_mean", "response_sum", "token_mean", "constant")
KL_NORMALIZERS = (*NORMALIZERS, "row_sum")


def token_weights(
    rows: Sequence[Rows], *, normalizer: str, response_lens: Sequence[int], max_tokens: int | None = None
) -> list[np.ndarray]:
    """One float32 array [num_scored] a response, row-major: what each scored token counts in the update's loss.

    rows and response_lens: of all N responses of the update, on all ranks. Their R rows score n_row tokens each.
    Normalizers:

    - response_length: 1 / (R · longest response). TraceRL's published block code (arXiv 2509.06949).
    - row_mean: 1 / (R · n_row). Its published full-attention code.
    - step_mean: the mean over a row's tokens, then over the response's rows, then over the responses that score any. CJ-GRPO
      (arXiv 2509.23924, as its paper has it; its code agrees when every response commits the same counts).
    - response_sum: 1 / the responses that score any. AGRPO (arXiv 2510.04019), whose rows bring their own weights.
    - row_sum: 1 / R. The KL term of that code; not meant for the policy term.
    - sequence_mean: the mean over a response's tokens, then over the responses that score any (GRPO).
    - token_mean: 1 / all scored tokens (DAPO).
    - constant: 1 / (N · max_tokens) (Dr.GRPO).

    A row's own weight multiplies all of these and changes no denominator. A response without rows gets an empty array.
    Raises ConfigError for another normalizer, or `constant` without max_tokens; ValueError if rows and response_lens differ
    in number.
    """
    if len(rows) != len(response_lens):
        raise ValueError(f"{len(rows)} row plans, {len(response_lens)} response lengths")
    counts = [part.scored.sum(1) for part in rows]  # n_row, per response
    weights = _weights(rows, counts, normalizer, response_lens, max_tokens)
    own = (part.entry_weight() for part in rows)
    return [(weight * mine).astype(np.float32) for weight, mine in zip(weights, own, strict=True)]


def _weights(rows, counts, normalizer: str, response_lens: Sequence[int], max_tokens: int | None) -> list[np.ndarray]:
    num_rows = sum(len(part) for part in rows)
    num_tokens = sum(int(count.sum()) for count in counts)
    if not num_tokens:
        return [np.zeros(0, np.float32) for _ in rows]
    if normalizer == "response_length":
        flat = 1.0 / (num_rows * max(response_lens))
    elif normalizer == "row_sum":
        flat = 1.0 / num_rows
    elif normalizer == "token_mean":
        flat = 1.0 / num_tokens
    elif normalizer == "constant":
        if not max_tokens:
            raise ConfigError("normalizer constant divides by rollout.decoder.max_tokens, which was not given")
        flat = 1.0 / (len(rows) * max_tokens)
    elif normalizer == "response_sum":
        flat = 1.0 / sum(bool(n.sum()) for n in counts)
    elif normalizer == "step_mean":
        live = sum(bool(n.sum()) for n in counts)
        return [np.repeat(1.0 / (live * max(len(n), 1) * np.maximum(n, 1)), n).astype(np.float32) for n in counts]
    elif normalizer == "row_mean":
        return [np.repeat(1.0 / (num_rows * np.maximum(n, 1)), n).astype(np.float32) for n in counts]
    elif normalizer == "sequence_mean":
        totals = [int(n.sum()) for n in counts]
        live = sum(total > 0 for total in totals)
        return [np.full(total, 1.0 / (live * max(total, 1)), np.float32) for total in totals]
    else:
        raise ConfigError(f"normalizer '{normalizer}' is none of {', '.join(KL_NORMALIZERS)}")
    return [np.full(int(n.sum()), flat, np.float32) for n in counts]
