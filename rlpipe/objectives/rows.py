"""Noisy rows: what the learner shows the model of one response, and which tokens it scores there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The R noisy rows of one response of L tokens. R may be 0: then there is nothing to learn from this response.

    masked bool[R, L]: the row's input shows MASK there, elsewhere the final token · scored bool[R, L]: the token
    enters the loss · step int32[R]: 0-based first denoising step of the row's slice, -1 for a row that replays none ·
    targets int32[R, L]: tokens to score, or None for the response itself · weight float32[R], or None for ones:
    multiplies the reducer's weights of the row's tokens. The order of scored tokens is row-major everywhere.

    Raises ValueError if shapes or dtypes differ from the above, or a scored position is not masked: a model that sees
    the token has nothing to predict.
    """

    masked: np.ndarray
    scored: np.ndarray
    step: np.ndarray
    targets: np.ndarray | None = None
    weight: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.scored.shape
        if len(shape) != 2 or self.masked.shape != shape or self.step.shape != shape[:1]:
            raise ValueError(f"rows disagree: scored {shape}, masked {self.masked.shape}, step {self.step.shape}")
        if self.weight is not None and self.weight.shape != shape[:1]:
            raise ValueError(f"weight {self.weight.shape} of rows {shape}")
        if self.targets is not None and self.targets.shape != shape:
            raise ValueError(f"targets {self.targets.shape} of rows {shape}")
        if self.masked.dtype != np.bool_ or self.scored.dtype != np.bool_:
            raise ValueError(f"masked is {self.masked.dtype} and scored is {self.scored.dtype}; both must be bool")
        visible = np.argwhere(self.scored & ~self.masked)
        if len(visible):
            raise ValueError(f"row {visible[0][0]} scores position {visible[0][1]}, which it does not mask")

    def __len__(self) -> int:
        return len(self.scored)

    @property
    def response_len(self) -> int:
        return self.scored.shape[1]

    @property
    def num_scored(self) -> int:
        return int(np.count_nonzero(self.scored))

    def row_weight(self) -> np.ndarray:
        """float32[R]."""
        return np.ones(len(self), np.float32) if self.weight is None else self.weight

    def partitions(self, loss_mask: np.ndarray) -> bool:
        """True if each token of loss_mask bool[L] is scored in exactly one row, and no other token in any."""
        return bool((self.scored.sum(0) == loss_mask).all())

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of one response under one another. Raises ValueError if only some have targets or lengths differ."""
        if len({part.targets is None for part in parts}) != 1:
            raise ValueError("rows with targets and rows without cannot be joined")
        return cls(
            masked=np.concatenate([part.masked for part in parts]),
            scored=np.concatenate([part.scored for part in parts]),
            step=np.concatenate([part.step for part in parts]),
            targets=None if parts[0].targets is None else np.concatenate([part.targets for part in parts]),
            weight=None if all(p.weight is None for p in parts) else np.concatenate([part.row_weight() for part in parts]),
        )
