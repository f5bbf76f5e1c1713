"""What the learner is fed: one sample a unit of packing, many samples as flat columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_RAGGED = {
    "prompt_ids": np.int32, "response_ids": np.int32, "masked": np.bool_, "scored": np.bool_, "targets": np.int32,
    "unit": np.int32, "coefficient": np.float32, "advantage": np.float32, "policy_weight": np.float32,
    "kl_weight": np.float32, "rollout_logp": np.float32, "lag": np.int32, "returns": np.float32,
}  # fmt: skip
_SCALARS = {"block_size": np.int32, "group": np.int32, "exact": np.bool_}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Noisy rows that must share a forward: all of a block trajectory, one row of a full-attention one (or all, if its ratio
    joins rows).

    prompt_ids int32[P] · response_ids int32[L] · group: samples of one group have the same prompt · masked, scored
    bool[R, L] · targets int32[R, L] or empty (the response itself).
    Float32[M], one value a scored token in row-major order: rollout_logp (as recorded; NaN where the learner's state is not
    the sampler's, so that nothing can be compared), returns (what a value model should say; empty without one).
    lag int32[M]: weight versions between the policy that opens the step and the one that drew the token; 0: the same weights.
    Float32[U], one value a unit of the ratio: advantage, policy_weight and kl_weight (reducer weights; their sums over an
    update are its loss). unit int32[M] and coefficient float32[M]: how tokens join into units (`objectives.units`); empty if
    each token is its own.
    exact: the learner should reproduce rollout_logp under the weights of the draw; False: stale keys, fused or cut
    distributions. Tokens that are not exact, or whose lag is not 0, came from another distribution than the policy's own: the
    loss weighs them by the ratio of the two.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    block_size: int
    group: int
    masked: np.ndarray
    scored: np.ndarray
    targets: np.ndarray
    advantage: np.ndarray
    policy_weight: np.ndarray
    kl_weight: np.ndarray
    rollout_logp: np.ndarray
    lag: np.ndarray
    unit: np.ndarray
    coefficient: np.ndarray
    returns: np.ndarray
    exact: bool = True

    @property
    def num_scored(self) -> int:
        return len(self.rollout_logp)

    @property
    def on_policy(self) -> np.ndarray:
        """bool[M]: tokens that the policy which opens the step drew itself."""
        return (self.lag == 0) & self.exact

    def shared_tokens(self) -> int:
        """Tokens of the packed prompt, counted once for all samples of a group."""
        return len(self.prompt_ids) // self.block_size * self.block_size if self.block_size else 0

    def own_tokens(self) -> int:
        """The other tokens of its piece; equals what `models.packing` builds."""
        prompt_len, response_len = len(self.prompt_ids), len(self.response_ids)
        if not self.block_size:
            return (prompt_len + response_len) * int(self.scored.any(1).sum())
        tail = prompt_len % self.block_size
        padded = np.zeros((len(self.scored), tail + response_len), bool)
        padded[:, tail:] = self.scored
        segments = padded.reshape(len(padded), -1, self.block_size).any(-1)
        return (int(np.flatnonzero(segments.any(0))[-1]) + int(segments.sum())) * self.block_size


@dataclass(frozen=True, slots=True)
class Samples(Sequence):
    """Many samples as flat numpy columns, which Ray moves without copying. Ragged columns come with `NAME.offsets`."""

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["rows"])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        c = self.columns
        parts = {k: c[k][c[f"{k}.offsets"][index] : c[f"{k}.offsets"][index + 1]] for k in _RAGGED}
        shape = (int(c["rows"][index]), -1)
        for k in ("masked", "scored"):
            parts[k] = parts[k].reshape(shape)
        parts["targets"] = parts["targets"].reshape(shape if parts["targets"].size else (0, 0))
        return Sample(**{k: c[k][index].item() for k in _SCALARS}, **parts)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Samples:
        columns = {"rows": np.array([len(sample.scored) for sample in samples], np.int32)}
        columns |= {name: np.array([getattr(s, name) for s in samples], dtype) for name, dtype in _SCALARS.items()}
        for name, dtype in _RAGGED.items():
            arrays = [getattr(sample, name).ravel() for sample in samples]
            offsets = np.zeros(len(arrays) + 1, np.int64)
            np.cumsum([len(a) for a in arrays], out=offsets[1:])
            columns[name] = np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
            columns[f"{name}.offsets"] = offsets
        return cls(columns)
