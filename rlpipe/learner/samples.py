"""What the learner is fed: one sample a packed sequence, many samples as flat columns, micro-batches planned ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_RAGGED = {
    "prompt_ids": np.int32, "response_ids": np.int32, "masked": np.bool_, "scored": np.bool_, "targets": np.int32,
    "advantage": np.float32, "policy_weight": np.float32, "kl_weight": np.float32, "rollout_logp": np.float32,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Noisy rows that share one packed sequence: all of a block trajectory, or one row of a full-attention one.

    prompt_ids int32[P] · response_ids int32[L] · masked, scored bool[R, L] · targets int32[R, L] or empty (the response
    itself) · the rest float32[M], one value a scored token in row-major order: advantage, policy_weight and kl_weight
    (reducer weights; their sums over an update are its loss), rollout_logp (as recorded; NaN where the learner's state is not
    the sampler's, so that nothing can be compared) · exact: the learner should reproduce rollout_logp; where it is False
    (stale keys, fused or cut distributions) the loss weighs each token by the ratio of the two.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    block_size: int
    masked: np.ndarray
    scored: np.ndarray
    targets: np.ndarray
    advantage: np.ndarray
    policy_weight: np.ndarray
    kl_weight: np.ndarray
    rollout_logp: np.ndarray
    exact: bool = True

    @property
    def num_scored(self) -> int:
        return len(self.advantage)

    def packed_tokens(self) -> int:
        """Length of the packed sequence; equals what `models.packing` builds."""
        prompt_len, response_len = len(self.prompt_ids), len(self.response_ids)
        if not self.block_size:
            return prompt_len + response_len
        tail = prompt_len % self.block_size
        padded = np.zeros((len(self.scored), tail + response_len), bool)
        padded[:, tail:] = self.scored
        segments = padded.reshape(len(padded), -1, self.block_size).any(-1)
        last_block = prompt_len // self.block_size + int(np.flatnonzero(segments.any(0))[-1])
        return (last_block + int(segments.sum())) * self.block_size


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
        return Sample(block_size=int(c["block_size"][index]), exact=bool(c["exact"][index]), **parts)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Samples:
        columns = {
            "rows": np.array([len(sample.scored) for sample in samples], np.int32),
            "block_size": np.array([sample.block_size for sample in samples], np.int32),
            "exact": np.array([sample.exact for sample in samples], np.bool_),
        }
        for name, dtype in _RAGGED.items():
            arrays = [getattr(sample, name).ravel() for sample in samples]
            offsets = np.zeros(len(arrays) + 1, np.int64)
            np.cumsum([len(a) for a in arrays], out=offsets[1:])
            columns[name] = np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
            columns[f"{name}.offsets"] = offsets
        return cls(columns)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a step. updates: for each optimizer update of an epoch its micro-batches, lists of sample indices; ~i
    stands for sample i with weight zero, there only so that all ranks do equally many passes. gauge: micro-batches that are
    scored for the parity gauge and not trained on."""

    samples: Samples
    updates: list[list[list[int]]]
    gauge: list[list[int]]


def plan_micro_batches(tokens: Sequence[int], token_budget: int, ranks: int) -> list[list[list[int]]]:
    """[rank][micro-batch][index]: samples of the given packed lengths over ranks, equal micro-batch counts on all of them.

    A micro-batch is padded to its longest sequence and holds at most token_budget tokens so counted; a longer sequence
    stands alone. Longest first, each micro-batch to the rank with the least work; the result depends on nothing else.
    Fillers (~index) repeat the shortest sample with weight zero.
    """
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    batches: list[list[int]] = []
    for index in order:
        if batches and tokens[batches[-1][0]] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    while 0 < len(batches) < ranks and any(len(batch) > 1 for batch in batches):  # no rank idle while one can share
        largest = max(batches, key=len)
        batches.remove(largest)
        batches += [largest[::2], largest[1::2]]
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for batch in batches:
        min(plan, key=lambda rank: (len(rank), sum(len(b) for b in rank))).append(batch)
    most = max(len(rank) for rank in plan)
    for rank in plan:
        rank.extend([~order[-1]] for _ in range(most - len(rank)))
    return plan


def make_shards(
    samples: Sequence[Sample], updates: Sequence[Sequence[int]], gauge: Sequence[int], token_budget: int, ranks: int
) -> list[Shard]:
    """Split a step over ranks. updates: sample indices of each optimizer update; gauge: of the samples only to be scored."""
    tokens = [sample.packed_tokens() for sample in samples]
    plans = [_plan(tokens, wanted, token_budget, ranks) for wanted in (*updates, gauge)]
    shards = []
    for rank in range(ranks):
        mine = [plan[rank] for plan in plans]
        held = sorted({max(i, ~i) for plan in mine for batch in plan for i in batch})
        local = {index: place for place, index in enumerate(held)}
        renamed = [[[local[i] if i >= 0 else ~local[~i] for i in batch] for batch in plan] for plan in mine]
        shards.append(Shard(Samples.of([samples[i] for i in held]), renamed[:-1], renamed[-1]))
    return shards


def _plan(tokens: Sequence[int], wanted: Sequence[int], budget: int, ranks: int) -> list[list[list[int]]]:
    if not wanted:
        return [[] for _ in range(ranks)]
    plan = plan_micro_batches([tokens[i] for i in wanted], budget, ranks)
    return [[[wanted[i] if i >= 0 else ~wanted[~i] for i in batch] for batch in rank] for rank in plan]
