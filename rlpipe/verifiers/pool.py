"""The verifier pool: responses out, rewards back, failures as values that name their cause."""

from __future__ import annotations

from collections.abc import Sequence

from rlpipe.actor_pool import ActorPool, Call, Failure
from rlpipe.cluster import Placement
from rlpipe.config import VerifierConfig
from rlpipe.errors import VerifierFailed
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.worker import VerifierWorker

Items = Sequence[tuple[Prompt, str]]
GroupScore = list[dict[str, float]]


class VerifierPool:
    """cfg.workers actors with cfg.name's verifier, or the task's own (`default_name`)."""

    def __init__(self, cfg: VerifierConfig, default_name: str, placement: Placement, start_timeout_s: float = 300.0):
        import ray

        self.cfg, self.name = cfg, cfg.name or default_name
        actor = ray.remote(VerifierWorker)
        self.pool = ActorPool(
            lambda index: actor.options(**placement.options("verifier", index)).remote(self.name),
            cfg.workers,
            name="verifier",
            retries=cfg.retries,
            start_timeout_s=start_timeout_s,
        )

    def score_groups(self, groups: Sequence[Items]) -> list[GroupScore | VerifierFailed]:
        """One entry a group, in order: a dict for each response, or the failure of the whole group.

        Groups are scored several to a call, groups of more than `batch_size` responses by several calls; a call that fails for
        good is taken apart, so that only the guilty group fails.
        """
        size = self.cfg.batch_size
        pieces = [(i, group[at : at + size]) for i, group in enumerate(groups) for at in range(0, len(group), size)]
        scores: list[GroupScore | VerifierFailed] = [[] for _ in groups]
        for (index, _), score in zip(pieces, self._score_pieces([items for _, items in pieces]), strict=True):
            if isinstance(scores[index], VerifierFailed):
                continue
            scores[index] = score if isinstance(score, VerifierFailed) else [*scores[index], *score]
        return scores

    def _score_pieces(self, groups: Sequence[Items]) -> list[GroupScore | VerifierFailed]:
        batches = _batches(groups, self.cfg.batch_size)
        scores: list[GroupScore | VerifierFailed | None] = [None] * len(groups)
        suspects = []
        for batch, result in zip(batches, self._run([[groups[i] for i in batch] for batch in batches]), strict=True):
            if isinstance(result, Failure) and len(batch) > 1:
                suspects += batch
            else:
                _assign(scores, groups, batch, result)
        for index, result in zip(suspects, self._run([[groups[i]] for i in suspects]), strict=True):
            _assign(scores, groups, [index], result)
        return scores

    def _run(self, batches: list[list[Items]]) -> list:
        calls = [
            Call("score", ([item for group in batch for item in group],), label=f"scoring {batch[0][0][0].uid} …")
            for batch in batches
        ]
        return self.pool.run(calls, timeout_s=self.cfg.timeout_s, what=f"verifier {self.name}") if calls else []

    def close(self) -> None:
        self.pool.close()


def _batches(groups: Sequence[Items], size: int) -> list[list[int]]:
    """Whole groups, in order, about `size` responses together."""
    batches: list[list[int]] = []
    room = 0
    for index, group in enumerate(groups):
        if not batches or room < len(group):
            batches.append([])
            room = size
        batches[-1].append(index)
        room -= len(group)
    return batches


def _assign(scores: list, groups: Sequence[Items], batch: list[int], result) -> None:
    if isinstance(result, Failure):
        uid = groups[batch[0]][0][0].uid
        failure = VerifierFailed(f"group {uid}: {result}")
        failure.__cause__ = result.cause
        scores[batch[0]] = failure
        return
    start = 0
    for index in batch:
        scores[index] = result[start : start + len(groups[index])]
        start += len(groups[index])
