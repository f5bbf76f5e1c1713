"""What makes a stock causal-LM class a diffusion language model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rlpipe.errors import ModelError

CONFIG_KEY = "diffusion"  # where the spec lives in a model folder's config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionSpec:
    """Example: `DiffusionSpec(mask_token_id=151669, eos_token_ids=(151643,), attention="block", block_size=4)`.

    attention: 'block' (bidirectional inside a block of the absolute grid, causal between blocks; SDAR, TraDo) or 'full'
    (LLaDA, Dream). block_size: of that grid; 0 for full attention. logit_shift: 1 if hidden row p-1 predicts position p
    (Dream), else 0. suppressed_ids: never sampled and given no probability, besides MASK (padding).
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...] = ()
    attention: str = "block"
    block_size: int = 4
    logit_shift: int = 0
    suppressed_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.attention not in ("block", "full"):
            raise ModelError(f"diffusion.attention is '{self.attention}'; it must be 'block' or 'full'")
        if (self.attention == "block") != (self.block_size > 0):
            raise ModelError(
                f"diffusion.attention '{self.attention}' with block_size {self.block_size}: a block model needs a positive "
                "block_size, a full-attention model needs 0"
            )
        if self.logit_shift not in (0, 1) or (self.logit_shift and self.attention == "block"):
            raise ModelError(f"diffusion.logit_shift is {self.logit_shift}; 0, or 1 with full attention")
        lost = sorted({*self.eos_token_ids} & {*self.forbidden_ids})
        if lost:
            raise ModelError(
                f"the id {lost[0]} ends a response and is MASK or suppressed, so that no response could end with it"
            )

    @property
    def forbidden_ids(self) -> tuple[int, ...]:
        """Ids whose logit is -inf in sampler and learner alike: MASK and the suppressed ones."""
        return tuple(sorted({self.mask_token_id, *self.suppressed_ids}))

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiffusionSpec:
        """Raises ModelError for what is no object, has unknown or missing keys, or holds what is no id."""
        try:
            known = {key: tuple(value) if isinstance(value, list) else value for key, value in dict(values).items()}
            spec = cls(**known)
            ids = (spec.mask_token_id, *spec.eos_token_ids, *spec.suppressed_ids)
            if not all(type(number) is int and number >= 0 for number in ids):
                raise TypeError(f"ids are whole numbers of at least 0, and these are {ids}")
            return spec
        except (TypeError, ValueError) as error:
            raise ModelError(f"the '{CONFIG_KEY}' entry of config.json does not fit: {error}") from error
