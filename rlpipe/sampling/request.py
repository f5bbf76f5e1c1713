"""What the engine is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One response wanted. prompt_ids int32[P], P ≥ 1, without MASK · uid, sample: its identity · seed: of its noise ·
    max_tokens: response tokens that count, 0 for the decoder's."""

    prompt_ids: np.ndarray
    uid: str
    sample: int
    seed: int
    max_tokens: int = 0
