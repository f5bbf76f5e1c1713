"""Numbers read from judged responses. Pure: arrays in, one figure a prompt out, so that prompts stay the unit of chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlpipe.evaluation.samples import Sample
from rlpipe.verifiers import registry
from rlpipe.voting import majority


def correctness(groups: Sequence[Sequence[Sample]]) -> np.ndarray:
    """float64[prompts, samples]: what counts towards accuracy, which is not always the reward."""
    return np.array([[registry.correctness(sample.parts) for sample in group] for group in groups], np.float64)


def values(groups: Sequence[Sequence[Sample]], part: str) -> np.ndarray:
    """float64[prompts, samples]: one part of each verdict. Raises KeyError if a verdict lacks it."""
    return np.array([[sample.parts[part] for sample in group] for group in groups], np.float64)


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """float64[prompts]: the chance that of k of a prompt's responses, picked at random without replacement, one is right.

    right: bool[prompts, n], k at most n. With c right ones it is 1 - C(n - c, k) / C(n, k), whose mean over fresh draws is
    pass@k without bias (Chen et al., arXiv 2107.03374, eq. 1; in whole numbers here, rounded once)."""
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples")
    chance = np.array([(math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k) for c in range(n + 1)])
    return chance[right.sum(1)]


def voted(texts: Sequence[Sequence[str]], values: np.ndarray) -> np.ndarray:
    """float64[prompts]: the value of each prompt's majority answer; texts and values [prompts, responses]."""
    return np.array([row[majority(mine)] for mine, row in zip(texts, values, strict=True)], np.float64)


def texts(groups: Sequence[Sequence[Sample]]) -> list[list[str]]:
    return [[sample.text for sample in group] for group in groups]


def speed(groups: Sequence[Sequence[Sample]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, forwards), int64[prompts]: summed over the responses of each prompt. Their ratio is tokens per forward."""
    tokens = np.array([sum(sample.tokens for sample in group) for group in groups], np.int64)
    return tokens, np.array([sum(sample.forwards for sample in group) for group in groups], np.int64)


def flat(groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]
