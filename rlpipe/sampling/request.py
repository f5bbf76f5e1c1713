"""What the engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response wanted. prompt_ids int32[P], P ≥ 1, without MASK · uid, sample: its identity · seed: of its noise.

    The rest overrides the decoder for this request: max_tokens (response tokens that count, 0: the decoder's), temperature,
    top_p, top_k (None: the decoder's) · stop_ids: end the response as EOS does, besides the model's · bias: added to the logits
    of these token ids, -inf forbids one · preset: {offset in the response: token id}, fixed beforehand (structure priors);
    these tokens are shown to the model and never scored.
    """

    prompt_ids: np.ndarray
    uid: str
    sample: int
    seed: int
    max_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_ids: tuple[int, ...] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    preset: Mapping[int, int] = field(default_factory=dict)

    def total_len(self, max_tokens: int) -> int:
        """Tokens of prompt and response at most; max_tokens: the decoder's."""
        return len(self.prompt_ids) + (self.max_tokens or max_tokens)
