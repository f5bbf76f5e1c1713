"""Held-out accuracy of the current weights under a decoder, through the same pools that train."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlpipe.config import DecoderConfig
from rlpipe.errors import VerifierFailed
from rlpipe.rollout.pool import Group, RolloutPool
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool
from rlpipe.voting import majority

SEED = 20_250_901  # of evaluation noise: the same for every run, so that runs are compared on the same draws


def evaluate(
    rollouts: RolloutPool,
    verifiers: VerifierPool,
    prompts: Sequence[Prompt],
    decoder: DecoderConfig,
    samples: int,
    name: str,
) -> dict[str, float]:
    """Metrics `eval/…` of one decoder: accuracy (mean reward over all samples), with several samples that of the majority's
    answer, tokens_per_step (valid tokens by denoising steps), response_len, eos_share. Raises VerifierFailed if any group could
    not be scored: a partial figure would mislead."""
    groups, rewards = _scored(rollouts, verifiers, prompts, decoder, samples, name)
    records = [trajectory for group in groups for trajectory in group.trajectories]
    tokens = sum(t.valid_len for t in records)
    steps = sum(int(t.events.step.max()) + 1 for t in records)
    metrics = {
        f"eval/{name}": float(rewards.mean()),
        f"eval/{name}_tokens_per_step": tokens / steps,
        f"eval/{name}_response_len": tokens / len(records),
        f"eval/{name}_eos_share": float(np.mean([t.stop == "eos" for t in records])),
    }
    if samples > 1:
        metrics[f"eval/{name}_majority"] = voted([group.texts for group in groups], rewards)
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
    texts: list[list[str]] = [[] for _ in prompts]
    rewards = []
    for size in block_sizes:
        changed = dataclasses.replace(decoder, block_size=size)
        groups, scores = _scored(rollouts, verifiers, prompts, changed, samples, f"blocks of {size}")
        rewards.append(scores)
        for mine, group in zip(texts, groups, strict=True):
            mine += group.texts
    joined = np.concatenate(rewards, axis=1)
    return {"eval/hex": voted(texts, joined), "eval/hex_members": float(joined.mean())}


def voted(texts: Sequence[Sequence[str]], rewards: np.ndarray) -> float:
    """Mean reward of each prompt's majority answer; texts and rewards [prompts, responses]."""
    return float(np.mean([row[majority(mine)] for mine, row in zip(texts, rewards, strict=True)]))


def _scored(
    rollouts: RolloutPool, verifiers: VerifierPool, prompts: Sequence[Prompt], decoder: DecoderConfig, samples: int, name: str
) -> tuple[list[Group], np.ndarray]:
    """(groups, rewards float [prompts, samples])."""
    groups, _ = rollouts.generate(prompts, samples, decoder, what=f"evaluation ({name})", seed=SEED)
    scores = verifiers.score_groups([[(group.prompt, text) for text in group.texts] for group in groups])
    for score in scores:
        if isinstance(score, VerifierFailed):
            raise score
    return groups, np.array([[part["reward"] for part in score] for score in scores])
