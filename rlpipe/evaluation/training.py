"""Held-out accuracy of the current weights under a decoder, in the middle of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlpipe.config import DecoderConfig
from rlpipe.evaluation import measures
from rlpipe.evaluation.drawing import draw, judge
from rlpipe.evaluation.samples import Sample
from rlpipe.rollout.pool import RolloutPool
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool


def evaluate(
    rollouts: RolloutPool,
    verifiers: VerifierPool,
    prompts: Sequence[Prompt],
    decoder: DecoderConfig,
    samples: int,
    name: str,
) -> dict[str, float]:
    """Metrics `eval/…` of one decoder: accuracy (mean of the rewards, or of `correct` where these are shaped), with several
    samples that of the majority's answer, tokens_per_step (valid tokens by denoising steps), response_len, eos_share. Raises
    VerifierFailed if any group could not be scored: a partial figure would mislead."""
    groups = _judged(rollouts, verifiers, prompts, decoder, samples, name)
    right, responses = measures.correctness(groups), measures.flat(groups)
    tokens, forwards = (int(counts.sum()) for counts in measures.speed(groups))
    metrics = {
        f"eval/{name}": float(right.mean()),
        f"eval/{name}_tokens_per_step": tokens / forwards,
        f"eval/{name}_response_len": tokens / len(responses),
        f"eval/{name}_eos_share": float(np.mean([sample.stop == "eos" for sample in responses])),
    }
    if samples > 1:
        metrics[f"eval/{name}_majority"] = float(measures.voted(measures.texts(groups), right).mean())
    return metrics


def evaluate_hex(
    rollouts: RolloutPool,
    verifiers: VerifierPool,
    prompts: Sequence[Prompt],
    decoder: DecoderConfig,
    samples: int,
    block_sizes: Sequence[int],
) -> dict[str, float]:
    """HEX: every prompt is sampled under each block length, and the answer most of them give is scored. eval/hex, and the mean
    of its members."""
    joined: list[list[Sample]] = [[] for _ in prompts]
    for size in block_sizes:
        changed = dataclasses.replace(decoder, block_size=size)
        groups = _judged(rollouts, verifiers, prompts, changed, samples, f"blocks of {size}")
        joined = [mine + group for mine, group in zip(joined, groups, strict=True)]
    right = measures.correctness(joined)
    return {
        "eval/hex": float(measures.voted(measures.texts(joined), right).mean()),
        "eval/hex_members": float(right.mean()),
    }


def _judged(
    rollouts: RolloutPool, verifiers: VerifierPool, prompts: Sequence[Prompt], decoder: DecoderConfig, samples: int, name: str
) -> list[list[Sample]]:
    found = dict(draw(rollouts, prompts, samples, decoder, name=name))
    return judge(verifiers, prompts, [found[index] for index in range(len(prompts))])
