"""The verifier pool: responses out, rewards back, failures as values that name their cause."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlpipe.actor_pool import ActorPool, Call, Failure
from rlpipe.cluster import Placement
from rlpipe.config import VerifierConfig
from rlpipe.errors import VerifierFailed
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.scorer import Scorer
from rlpipe.verifiers.worker import VerifierWorker

Items = Sequence[tuple[Prompt, str]]
GroupScore = list[dict[str, float]]


class VerifierPool:
    """cfg.workers actors that judge as section `verifier` says; default_name: the task's own verifier.

    A verdict is of the prompt and the text alone, so equal texts in a group are judged once. asked, judged: counts of texts
    since the start, given and different ones.
    """

    def __init__(
        self,
        cfg: VerifierConfig,
        default_name: str,
        placement: Placement,
        start_timeout_s: float = 300.0,
        spans: Callable | None = None,
    ):
        import ray

        self.cfg, self.scorer = cfg, Scorer(cfg, default_name)
        self.name = str(self.scorer)
        self.asked = self.judged = 0
        actor = ray.remote(VerifierWorker)
        self.pool = ActorPool(
            lambda index: actor.options(**placement.options("verifier", index)).remote(cfg, default_name),
            cfg.workers,
            name="verifier",
            retries=cfg.retries,
            minimum=1,
            has_place=lambda index: placement.ready("verifier", index),
            start_timeout_s=start_timeout_s,
            spans=spans,
        )

    def score_groups(self, groups: Sequence[Items]) -> list[GroupScore | VerifierFailed]:
        """One entry a group, in order: a dict for each response, or the failure of the whole group.

        Groups are scored several to a call, groups of more than `batch_size` different responses by several calls; a call that
        fails for good is taken apart, so that only the guilty group fails.
        """
        places, different = zip(*map(_different, groups), strict=True) if groups else ((), ())
        self.asked += sum(map(len, groups))
        self.judged += sum(map(len, different))
        scores = self._score_different(different)
        return [
            score if isinstance(score, VerifierFailed) else [dict(score[place]) for place in own]
            for score, own in zip(scores, places, strict=True)
        ]

    def submit(self, group: Items, take: Callable[[GroupScore | VerifierFailed], None]) -> tuple[int, int]:
        """Set off the judging of one group; take(verdicts in order, or the failure of the whole group) is called once, on a
        thread of the pool's. Returns how many texts were asked about, and how many different ones are judged."""
        places, different = _different(group)
        self.asked += len(group)
        self.judged += len(different)
        size = self.cfg.batch_size
        pieces = [different[at : at + size] for at in range(0, len(different), size)]
        whole = _Whole(
            len(pieces),
            lambda score: take(score if isinstance(score, VerifierFailed) else [dict(score[place]) for place in places]),
        )
        for number, piece in enumerate(pieces):
            call = Call("score", (piece,), label=f"scoring {group[0][0].uid} …")
            self.pool.submit(
                call,
                lambda result, more, number=number: whole.take(number, group, result),
                timeout_s=self._deadline([[piece]]),
                what=f"verifier {self.name}",
            )
        return len(group), len(different)

    def score_states(self, prompt: Prompt, texts: Sequence[str]) -> list[dict[str, float]]:
        """A dict for each text: what the full predictions of one response, or of several, are worth. Raises VerifierFailed."""
        (score,) = self.score_groups([[(prompt, text) for text in texts]])
        if isinstance(score, VerifierFailed):
            raise score
        return score

    def _score_different(self, groups: Sequence[Items]) -> list[GroupScore | VerifierFailed]:
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
        return self.pool.run(calls, timeout_s=self._deadline(batches), what=f"verifier {self.name}") if calls else []

    def _deadline(self, batches: list[list[Items]]) -> float:
        """Seconds: verifiers that end their own work, as that of programs, are given the time for it; else a batch of programs
        that never end would look like a dead verifier."""
        own = [self.scorer.longest_of([prompt for group in batch for prompt, _ in group]) for batch in batches]
        return max([self.cfg.timeout_s, *own])

    def close(self) -> None:
        self.pool.close()


class _Whole:
    """The pieces of a group that is judged by several calls. Called on the pool's thread alone."""

    def __init__(self, count: int, take: Callable[[GroupScore | VerifierFailed], None]):
        self.scores: list = [None] * count
        self.left, self.give = count, take

    def take(self, number: int, group: Items, result: GroupScore | Failure) -> None:
        if self.left < 0:
            return
        if isinstance(result, Failure):
            self.left = -1
            self.give(_failure(group, result))
            return
        self.scores[number] = result
        self.left -= 1
        if not self.left:
            self.left = -1
            self.give([verdict for piece in self.scores for verdict in piece])


def _failure(group: Items, result: Failure) -> VerifierFailed:
    failure = VerifierFailed(f"group {group[0][0].uid}: {result}")
    failure.__cause__ = result.cause
    return failure


def _different(group: Items) -> tuple[list[int], list[tuple[Prompt, str]]]:
    """(index of each item among the different ones, those in order of their first appearance).

    Items are equal if their prompts' uids and their texts are.
    """
    first: dict[tuple[str, str], int] = {}
    different = []
    for prompt, text in group:
        if first.setdefault((prompt.uid, text), len(different)) == len(different):
            different.append((prompt, text))
    return [first[prompt.uid, text] for prompt, text in group], different


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
        scores[batch[0]] = _failure(groups[batch[0]], result)
        return
    start = 0
    for index in batch:
        scores[index] = result[start : start + len(groups[index])]
        start += len(groups[index])
