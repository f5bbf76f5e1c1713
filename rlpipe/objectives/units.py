"""Units of the ratio: how scored log-probabilities join before anything is clipped.

A token by itself (PPO, TraceRL), the entries of one position over several rows (coupled-GRPO), of one denoising step (EGSPO)
or of a whole response (GSPO, ESPO): always a sum, unit = Σ coefficient · log p. Old, reference and new log-probabilities join
alike. What a reducer, an advantage and a clip see are units.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from rlpipe.errors import ConfigError
from rlpipe.objectives.rows import Rows

UNITS = ("token", "position", "step", "sequence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The U units of one response with M scored entries.

    entry int32[M]: the unit that each scored entry joins, row-major · coefficient float32[M] · row int32[U]: the row it belongs
    to, 0 where it spans several (reducers count rows) · weight float32[U]: the planner's own · span int32[U]: how many response
    tokens it stands for · credit float32[U]: its own advantage, or None for the response's.
    """

    entry: np.ndarray
    coefficient: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    span: np.ndarray
    credit: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row)

    @property
    def plain(self) -> bool:
        """Every entry is a unit of its own, with coefficient 1."""
        return len(self.row) == len(self.entry) and bool((self.coefficient == 1).all())


def join(rows: Rows, kind: str, blocks: np.ndarray, num_tokens: int | None = None) -> Units:
    """rows of one response, blocks int[L] the block of each response token (0 under full attention) → its units.

    token: each entry · position: the entries of a response position, over all rows · step: those of a row and block, summed
    (rows of block models replay a step of every block at once) · sequence: all of them, their mean. A planner's own
    coefficients replace the 1 or 1 / M; of a token by itself they are its weight instead, so that its ratio stays one of
    probabilities. num_tokens: of the response, the span of a sequence; None counts the positions that rows score. Raises
    ConfigError for another kind, ValueError if rows with credit of their own join.
    """
    row, place = np.nonzero(rows.scored)
    if kind == "token":
        key = np.arange(len(row))
    elif kind == "position":
        key = place
    elif kind == "step":
        key = row * (int(blocks.max(initial=0)) + 1) + blocks[place]
    elif kind == "sequence":
        key = np.zeros(len(row), np.int64)
    else:
        near = get_close_matches(kind, UNITS, 1, 0.0)[0]
        raise ConfigError(f"algo.ratio={kind}: known are {', '.join(UNITS)}; did you mean {near}?")
    if kind == "token":
        first = entry = key
    else:
        _, first, entry = np.unique(key, return_index=True, return_inverse=True)
    spans_rows = kind in ("position", "sequence")
    if rows.credit is not None and spans_rows:
        raise ValueError(f"rows with an advantage each cannot join into units of kind {kind}")
    weight = rows.entry_weight()
    coefficient = np.full(len(row), 1.0 / max(len(row), 1) if kind == "sequence" else 1.0)
    if rows.coefficient is not None and kind == "token":
        weight = weight * rows.coefficient[rows.scored]
    elif rows.coefficient is not None:
        coefficient = rows.coefficient[rows.scored]
    size = np.bincount(entry, minlength=len(first))
    if kind == "step":
        span = size
    elif kind == "sequence":
        span = np.full(len(first), len(np.unique(place)) if num_tokens is None else num_tokens)
    else:
        span = np.ones(len(first))
    return Units(
        entry=entry.astype(np.int32),
        coefficient=coefficient.astype(np.float32),
        row=np.zeros(len(first), np.int32) if spans_rows else row[first].astype(np.int32),
        weight=(np.bincount(entry, weight, len(first)) / np.maximum(size, 1)).astype(np.float32),
        span=span.astype(np.int32),
        credit=None if rows.credit is None else rows.credit[row[first]].astype(np.float32),
    )
