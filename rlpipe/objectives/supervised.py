"""Supervised objectives: rows of demonstrations and of recorded trajectories, and what is asked of them.

The learner does not know that it is supervised: the advantage is 1, the loss -Σ weight · log p (`losses.likelihood_loss`), the
reducer `weight_mean`. So packing, ranks, LoRA and checkpoints are those of RL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlpipe.errors import ConfigError
from rlpipe.objectives.losses import Certainty, likelihood_loss
from rlpipe.objectives.masking import random_part
from rlpipe.objectives.objective import Preset
from rlpipe.objectives.planner import Replay, counted_tokens, response_blocks
from rlpipe.objectives.rows import Rows
from rlpipe.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class MaskedBlocks:
    """States of a decoder that goes block by block: a part of one block masked and scored, the blocks before it clean, those
    behind it masked and not scored.

    size: tokens of a block under full attention, counted from the start of the answer; 0: the whole answer is one block. Where
    it is not 0, blocks that the trajectory was decoded in go before it. Block models have their own grid, and all their blocks
    are masked side by side in one row, since a block is seen by itself behind clean ones · draws: rows of a response, each for
    another block until all had one; 0: every block once · share: of a block that is masked; 0: n of its tokens, n uniform over
    1 … all, each token weighing all / n · complement: a second row masks the rest of the block, so that each of its tokens is
    scored once.

    The weights of a response add up to its tokens that count (on average, where fewer rows than blocks are drawn and blocks
    differ in size), so their weighted mean is a loss per token. With share 0 its
    expectation is the bound on the negative log-likelihood that masked diffusion is trained with: uniform n with weight all / n
    is the integral over t of masking by chance t with weight 1/t (LLaDA, arXiv 2502.09992) without the variance of the count;
    block by block it is BD3-LM's (arXiv 2503.09573). The semi-autoregressive SFT of TraceRL's code masks tokens by chance in
    (.1, .9) without that weight. Half masked with the complement is dParallel's (arXiv 2509.26488), whose code masks each token
    by chance. Tokens that do not count are masked in every row. Raises ConfigError for numbers that make no rows.
    """

    size: int = 0
    draws: int = 1
    share: float = 0.0
    complement: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "draws"):
            if getattr(self, name) < 0:
                raise ConfigError(f"sft.options.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.share <= 1 or (self.complement and not 0 < self.share < 1):
            bounds = "above 0 and below 1 where sft.options.complement is on" if self.complement else "from 0 to 1"
            raise ConfigError(f"sft.options.share={self.share}: a share {bounds}")

    @property
    def replays_rollout(self) -> bool:
        return False

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        counted, block = counted_tokens(trajectory), self._blocks(trajectory)
        total = np.bincount(block, counted, 1).astype(np.int64)
        live = np.flatnonzero(total)
        together = bool(trajectory.block_size)
        draws = (self.draws or (1 if together else len(live))) if len(live) else 0
        scored, masked, weight = [], [], []
        for draw in range(draws):
            if draw % len(live) == 0:
                order = rng.permutation(live)
            shown = order[draw % len(live)]
            own = np.ones_like(counted) if together else block == shown
            behind = ~own & counted & (block > shown)
            taken = self._taken(total, rng)
            part = random_part(counted, block, taken, rng) & own
            once = (1.0 if together else float(len(live))) / draws
            scale = once * (np.ones(len(total)) if self.complement else total / np.maximum(taken, 1))
            for chosen in (part, counted & own & ~part)[: 1 + self.complement]:
                scored.append(chosen)
                masked.append(chosen | behind)
                weight.append(np.where(chosen, scale[block], 0.0))
        shape = (len(scored), trajectory.response_len)
        given = np.zeros(trajectory.response_len, bool)
        given[trajectory.events.position[trajectory.events.step < 0]] = True
        rows = Rows(
            masked=np.array(masked, bool).reshape(shape) | ~(counted | given),
            scored=np.array(scored, bool).reshape(shape),
            step=np.full(shape[0], -1, np.int32),
            weight=np.array(weight, np.float32).reshape(shape),
        )
        return rows.take(rows.scored.any(1))

    def _blocks(self, trajectory: Trajectory) -> np.ndarray:
        """int64[L]: the block of each response token, 0 for the first."""
        if trajectory.block_size or not self.size:
            block = response_blocks(trajectory)
            return block - block.min(initial=block[0] if len(block) else 0)
        return np.arange(trajectory.response_len) // (trajectory.decoder.get("block_size") or self.size)

    def _taken(self, total: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int64[blocks]: how many of each block's tokens are masked."""
        if not self.share:
            return rng.integers(1, np.maximum(total, 1) + 1)
        taken = np.minimum((self.share * total + rng.random(len(total))).astype(np.int64), total)
        return taken if self.complement else np.maximum(taken, np.minimum(total, 1))


@dataclass(frozen=True, slots=True)
class Recorded(Replay):
    """The states of a recorded trajectory's step map, as TraceRL's rows have them, whatever model it was recorded with."""

    @property
    def replays_rollout(self) -> bool:
        return False


MASKS = Preset(planner=MaskedBlocks, loss=likelihood_loss)
TRACE = Preset(planner=Recorded, loss=likelihood_loss)
CERTAINTY = Preset(planner=MaskedBlocks, loss=likelihood_loss, certainty=Certainty)

SUPERVISED: dict[str, tuple[str, dict[str, Any]]] = {  # objective: (name of its preset here, its numbers)
    "random_mask": ("MASKS", {}),
    "block": ("MASKS", {"size": 32}),
    "trace": ("TRACE", {}),
    "certainty": (
        "CERTAINTY",
        {"size": 32, "share": 0.5, "complement": True, "entropy_weight": 2.0, "entropy_temperature": 0.5},
    ),
}


def supervised_settings(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of `algo` for a supervised objective. options: of the recipe, over the objective's own numbers."""
    preset, numbers = SUPERVISED[name]
    numbers = {**numbers, **options}
    return {
        "preset": f"{__name__}:{preset}",
        "shrink": numbers.pop("shrink", 1),
        "options": numbers,
        "normalizer": "weight_mean",
        "updates_per_step": 1,
        "epochs": 1,
    }
