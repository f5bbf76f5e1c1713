"""The one way to responses of an evaluation: drawn by the rollout pool, judged by the verifier pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rlpipe.config import DecoderConfig
from rlpipe.errors import VerifierFailed
from rlpipe.evaluation.samples import SEED, Sample
from rlpipe.rollout.pool import RolloutPool
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool


def draw(
    rollouts: RolloutPool, prompts: Sequence[Prompt], samples: int, decoder: DecoderConfig, *, name: str, seed: int = SEED
) -> Iterator[tuple[int, list[Sample]]]:
    """(index of the prompt, its unjudged samples in order) as groups are done. A response depends on weights, prompt, decoder,
    seed and its own number alone. name: of the decoder, for the log."""
    for index, group, _ in rollouts.stream(prompts, samples, decoder, what=f"evaluation ({name})", seed=seed):
        yield index, [Sample.of(t, text) for t, text in zip(group.trajectories, group.texts, strict=True)]


def judge(verifiers: VerifierPool, prompts: Sequence[Prompt], groups: Sequence[list[Sample]]) -> list[list[Sample]]:
    """The groups with their verdicts; groups[i] belongs to prompts[i]. Raises VerifierFailed if any group could not be scored:
    a partial figure would mislead."""
    scores = verifiers.score_groups(
        [[(prompt, sample.text) for sample in group] for prompt, group in zip(prompts, groups, strict=True)]
    )
    for score in scores:
        if isinstance(score, VerifierFailed):
            raise score
    return [
        [dataclasses.replace(sample, parts=parts) for sample, parts in zip(group, score, strict=True)]
        for group, score in zip(groups, scores, strict=True)
    ]
