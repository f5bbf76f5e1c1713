"""A decoder frozen for one run of the engine: recipe settings resolved against the model's spec."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlpipe.config import DecoderConfig
from rlpipe.errors import ConfigError
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.selection import SCORERS, select_static, select_threshold


@dataclass(frozen=True, slots=True)
class Decoder:
    """block_size: of commits; for full attention 0 means the whole canvas. stop: 'block' (a finished block holds EOS) or
    'prefix' (EOS and everything before it is committed)."""

    max_tokens: int
    block_size: int
    select: str
    tokens_per_step: int
    threshold: float
    score: str
    temperature: float
    stop: str

    @classmethod
    def resolve(cls, config: DecoderConfig, spec: DiffusionSpec) -> Decoder:
        """Raises ConfigError where the recipe contradicts the model."""
        if config.score not in SCORERS:
            raise ConfigError(f"decoder.score={config.score}: known scores are {', '.join(SCORERS)}")
        if config.select not in ("static", "threshold"):
            raise ConfigError(f"decoder.select={config.select}: known selectors are static, threshold")
        if spec.attention == "block" and config.block_size not in (0, spec.block_size):
            raise ConfigError(
                f"decoder.block_size={config.block_size}, but the model attends in blocks of {spec.block_size}; "
                "leave it 0, or set model.block_size to adapt the model"
            )
        return cls(
            max_tokens=config.max_tokens,
            block_size=spec.block_size if spec.attention == "block" else config.block_size,
            select=config.select,
            tokens_per_step=config.tokens_per_step,
            threshold=config.threshold,
            score=config.score,
            temperature=config.temperature,
            stop="block" if spec.attention == "block" else "prefix",
        )

    def choose(self, score: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(commit, forced), bool [slots, B]; at least one commit in every slot with a masked position."""
        if self.select == "static":
            return select_static(score, masked, self.tokens_per_step)
        return select_threshold(score, masked, self.tokens_per_step, self.threshold)

    def settings(self) -> dict[str, Any]:
        """What a trajectory records."""
        return asdict(self) | {"state_only": SCORERS[self.score].state_only}
