"""A decoder frozen for one run of the engine: recipe settings resolved against the model's spec."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from rlpipe.config import DecoderConfig
from rlpipe.errors import ConfigError
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.selection import SCORERS, SELECTORS, Selector, StepView


@dataclass(frozen=True, slots=True)
class Decoder:
    """block_size: of commits; for full attention 0 means the whole canvas. stop: 'block' (a finished block holds EOS) or
    'prefix' (EOS and everything before it is committed)."""

    max_tokens: int
    block_size: int
    select: str
    selector: Selector
    score: str
    eos_gamma: float
    temperature: float
    stop: str

    @classmethod
    def resolve(cls, config: DecoderConfig, spec: DiffusionSpec) -> Decoder:
        """Raises ConfigError where the recipe contradicts the model."""
        if config.score not in SCORERS:
            raise ConfigError(f"decoder.score={config.score}: known scores are {', '.join(SCORERS)}")
        selector = make_selector(config)
        if config.eos_gamma < 1 and not hasattr(selector, "progress"):
            raise ConfigError(f"decoder.eos_gamma needs a selector with a fixed number of steps, not {config.select}")
        if spec.attention == "block" and config.block_size not in (0, spec.block_size):
            raise ConfigError(
                f"decoder.block_size={config.block_size}, but the model attends in blocks of {spec.block_size}; "
                "leave it 0, or set model.block_size to adapt the model"
            )
        return cls(
            max_tokens=config.max_tokens,
            block_size=spec.block_size if spec.attention == "block" else config.block_size,
            select=config.select,
            selector=selector,
            score=config.score,
            eos_gamma=config.eos_gamma,
            temperature=config.temperature,
            stop="block" if spec.attention == "block" else "prefix",
        )

    @property
    def state_only(self) -> bool:
        """Positions depend on the state and not on the draws, so the product of token probabilities is the transition's."""
        return SCORERS[self.score].state_only and self.eos_gamma >= 1

    def weigh_eos(self, score: torch.Tensor, is_eos: torch.Tensor, block_step: torch.Tensor) -> torch.Tensor:
        """EOSER (arXiv 2509.23924): the score of a drawn EOS is multiplied by a factor that rises from eos_gamma to 1 over the
        steps of a block. The published schedule restarts in every block but counts all steps; ours counts the block's own."""
        if self.eos_gamma >= 1:
            return score
        progress = self.selector.progress(block_step, score.shape[1]).clamp_max(1.0)
        factor = self.eos_gamma + (1.0 - self.eos_gamma) * progress
        return torch.where(is_eos, score * factor.unsqueeze(-1).float(), score)

    def choose(self, view: StepView) -> tuple[torch.Tensor, torch.Tensor]:
        """(commit, forced), bool [slots, B]; at least one commit in every slot with a masked position."""
        return self.selector(view)

    def settings(self) -> dict[str, Any]:
        """What a trajectory records."""
        return asdict(self) | {"state_only": self.state_only}


def make_selector(config: DecoderConfig) -> Selector:
    """The recipe's selector with its numbers; ConfigError for an unknown name or number, with the nearest one."""
    if config.select not in SELECTORS:
        near = difflib.get_close_matches(config.select, SELECTORS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"decoder.select={config.select}: known selectors are {', '.join(SELECTORS)}; did you mean {near}?")
    kind = SELECTORS[config.select]
    known = [field.name for field in fields(kind)]
    numbers = {"quota": config.tokens_per_step, "threshold": config.threshold}
    for name in config.options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"decoder.options.{name}: selector {config.select} has no such number{hint}")
    return kind(**{k: v for k, v in numbers.items() if k in known} | config.options)
