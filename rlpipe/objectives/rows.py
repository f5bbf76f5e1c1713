"""Noisy rows: what the learner shows the model of one response, and which tokens it scores there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHAPES = {"targets": (2,), "weight": (1, 2), "coefficient": (2,), "credit": (1,)}  # axes of [R, L] that optional fields have


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The R noisy rows of one response of L tokens. R may be 0: then there is nothing to learn from this response.

    masked bool[R, L]: the row's input shows MASK there, elsewhere the final token · scored bool[R, L]: the token
    enters the loss · step int32[R]: 0-based first denoising step of the row's slice, -1 for a row that replays none ·
    targets int32[R, L]: tokens to score, or None for the response itself. The order of scored tokens is row-major everywhere.
    Further, each None for the plain case:

    - weight float32[R] or [R, L]: multiplies the reducer's weights.
    - coefficient float32[R, L]: of each log-probability in the unit it joins (`rlpipe.objectives.units`).
    - credit float32[R]: the row's own advantage, instead of the response's (step-wise credit).

    Raises ValueError if shapes or dtypes differ from the above, or a scored position is not masked: a model that sees
    the token has nothing to predict.
    """

    masked: np.ndarray
    scored: np.ndarray
    step: np.ndarray
    targets: np.ndarray | None = None
    weight: np.ndarray | None = None
    coefficient: np.ndarray | None = None
    credit: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.scored.shape
        if len(shape) != 2 or self.masked.shape != shape or self.step.shape != shape[:1]:
            raise ValueError(f"rows disagree: scored {shape}, masked {self.masked.shape}, step {self.step.shape}")
        for name, fits in _SHAPES.items():
            value = getattr(self, name)
            if value is not None and value.shape not in [shape[:axes] for axes in fits]:
                raise ValueError(f"{name} {value.shape} of rows {shape}")
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

    def entry_weight(self) -> np.ndarray:
        """float32[M]: the weight of each scored token."""
        weight = np.ones(len(self), np.float32) if self.weight is None else self.weight
        return np.broadcast_to(weight if weight.ndim == 2 else weight[:, None], self.scored.shape)[self.scored]

    def take(self, keep: np.ndarray) -> Rows:
        """The rows of the given indices or bool mask, in that order."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return Rows(**{name: None if value is None else value[keep] for name, value in own.items()})

    def partitions(self, loss_mask: np.ndarray) -> bool:
        """True if each token of loss_mask bool[L] is scored in exactly one row, and no other token in any."""
        return bool((self.scored.sum(0) == loss_mask).all())

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of one response under one another. Raises ValueError if only some have an optional field or lengths differ."""
        joined = {}
        for name in cls.__slots__:
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values) and not all(value is None for value in values):
                raise ValueError(f"rows with {name} and rows without cannot be joined")
            joined[name] = None if values[0] is None else np.concatenate(values)
        return cls(**joined)
