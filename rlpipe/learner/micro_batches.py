"""Which samples share a forward, and on which rank: planned ahead, equal counts on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlpipe.learner.samples import Sample, Samples


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a step. updates: for each optimizer update of an epoch its micro-batches, lists of sample indices; ~i
    stands for sample i with weight zero, there only so that all ranks do equally many passes. gauge: micro-batches that are
    scored for the parity gauge and not trained on. places: of its samples in the step."""

    samples: Samples
    updates: list[list[list[int]]]
    gauge: list[list[int]]
    places: list[int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of N samples: own int[N] tokens, shared int[N] tokens of the prompt, group int[N]: samples of a group share them."""

    own: np.ndarray
    shared: np.ndarray
    group: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Sizes:
        columns = [(s.own_tokens(), s.shared_tokens(), s.group) for s in samples]
        return cls(*np.array(columns, np.int64).reshape(-1, 3).T)

    def tokens(self, batch: Sequence[int]) -> int:
        """Tokens of a micro-batch: own ones, and a prompt for each group in it."""
        batch = np.asarray(batch, np.int64)
        _, first = np.unique(self.group[batch], return_index=True)
        return int(self.own[batch].sum() + self.shared[batch[first]].sum())


def plan_micro_batches(sizes: Sizes, wanted: Sequence[int], token_budget: int, ranks: int) -> list[list[list[int]]]:
    """[rank][micro-batch][index]: the wanted samples over ranks, equal micro-batch counts on all of them.

    A micro-batch holds at most token_budget tokens; a larger sample stands alone. Samples of a group stay together as far as
    the budget allows, so that their prompt is computed once. Largest first, each micro-batch to the rank with the least work;
    the result depends on nothing else. Fillers (~index) repeat the smallest sample with weight zero.
    """
    if not len(wanted):
        return [[] for _ in range(ranks)]
    batches: list[list[int]] = []
    room: list[int] = []
    for tokens, bundle in _bundles(sizes, wanted, token_budget):
        place = next((i for i, free in enumerate(room) if tokens <= free), None)
        if place is None:
            batches.append([])
            room.append(token_budget)
            place = len(room) - 1
        batches[place] += bundle
        room[place] -= tokens
    while len(batches) < ranks and any(len(batch) > 1 for batch in batches):  # no rank idle while one can share
        largest = max((batch for batch in batches if len(batch) > 1), key=sizes.tokens)
        batches.remove(largest)
        batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    for tokens, batch in sorted(((sizes.tokens(batch), batch) for batch in batches), key=lambda pair: (-pair[0], pair[1])):
        rank = min(range(ranks), key=lambda r: (len(plan[r]), work[r]))
        plan[rank].append(batch)
        work[rank] += tokens
    most = max(len(rank) for rank in plan)
    smallest = min(wanted, key=lambda i: (sizes.own[i] + sizes.shared[i], i))
    for rank in plan:
        rank.extend([~smallest] for _ in range(most - len(rank)))
    return plan


def _bundles(sizes: Sizes, wanted: Sequence[int], budget: int) -> list[tuple[int, list[int]]]:
    """(tokens, samples of one group that fit the budget together), largest bundles first."""
    groups: dict[int, list[int]] = {}
    for index in wanted:
        key = int(sizes.group[index]) if sizes.shared[index] else -1 - index  # without a prompt to share each is its own
        groups.setdefault(key, []).append(index)
    bundles: list[tuple[int, list[int]]] = []
    for members in groups.values():
        members.sort(key=lambda i: (-sizes.own[i], i))
        tokens = 0
        for index in members:
            own = int(sizes.own[index])
            if not tokens or tokens + own > budget:
                bundles.append((0, []))
                tokens = int(sizes.shared[index])
            tokens += own
            bundles[-1] = (tokens, [*bundles[-1][1], index])
    return sorted(bundles, key=lambda bundle: (-bundle[0], bundle[1]))


def make_shards(
    samples: Sequence[Sample], updates: Sequence[Sequence[int]], gauge: Sequence[int], token_budget: int, ranks: int
) -> list[Shard]:
    """Split a step over ranks. updates: sample indices of each optimizer update; gauge: of the samples only to be scored."""
    sizes = Sizes.of(samples)
    plans = [plan_micro_batches(sizes, wanted, token_budget, ranks) for wanted in (*updates, gauge)]
    shards = []
    for rank in range(ranks):
        mine = [plan[rank] for plan in plans]
        held = sorted({max(i, ~i) for plan in mine for batch in plan for i in batch})
        local = {index: place for place, index in enumerate(held)}
        renamed = [[[local[i] if i >= 0 else ~local[~i] for i in batch] for batch in plan] for plan in mine]
        shards.append(Shard(Samples.of([samples[i] for i in held]), renamed[:-1], renamed[-1], held))
    return shards
