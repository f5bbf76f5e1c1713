"""Held-out accuracy of the current weights under a decoder, through the same pools that train."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlpipe.config import DecoderConfig
from rlpipe.errors import VerifierFailed
from rlpipe.rollout.pool import RolloutPool
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool

SEED = 20_250_901  # of evaluation noise: the same for every run, so that runs are compared on the same draws


def evaluate(
    rollouts: RolloutPool,
    verifiers: VerifierPool,
    prompts: Sequence[Prompt],
    decoder: DecoderConfig,
    samples: int,
    name: str,
) -> dict[str, float]:
    """Metrics `eval/…` of one decoder: accuracy (mean reward over all samples), tokens_per_step (valid tokens by denoising
    steps), response_len, eos_share. Raises VerifierFailed if any group could not be scored: a partial figure would mislead."""
    groups, _ = rollouts.generate(prompts, samples, decoder, what=f"evaluation ({name})", seed=SEED)
    scores = verifiers.score_groups([[(group.prompt, text) for text in group.texts] for group in groups])
    for score in scores:
        if isinstance(score, VerifierFailed):
            raise score
    rewards = np.array([[part["reward"] for part in score] for score in scores])
    records = [trajectory for group in groups for trajectory in group.trajectories]
    tokens = sum(t.valid_len for t in records)
    steps = sum(int(t.events.step.max()) + 1 for t in records)
    return {
        f"eval/{name}": float(rewards.mean()),
        f"eval/{name}_tokens_per_step": tokens / steps,
        f"eval/{name}_response_len": tokens / len(records),
        f"eval/{name}_eos_share": float(np.mean([t.stop == "eos" for t in records])),
    }
