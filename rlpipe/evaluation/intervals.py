"""Confidence intervals over prompts. Several responses to one prompt are not independent; prompts are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with the interval that covers the true one with the wanted confidence; both ends None where one prompt is all
    there is to go by."""

    value: float
    low: float | None
    high: float | None

    def json(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


def share(values: np.ndarray, confidence: float, draws: float = 1.0) -> Estimate:
    """Mean of a figure that lies in [0, 1] for every prompt; values float64[prompts].

    Wilson's score interval on the effective number of independent draws n = m (1 - m) / (s² / prompts), m mean and s² variance
    of the values (Korn & Graubard 1998 use the same n, in Clopper and Pearson's interval). One draw a prompt makes it Wilson's
    interval itself. draws: independent draws behind each value, at least 1; n is at most prompts × draws. Where all values are
    0 or all are 1 nothing shows how alike the draws of a prompt are, so n is the number of prompts.
    """
    count, mean = len(values), float(values.mean())
    if count == 1 and 0 < mean < 1:
        return Estimate(mean, None, None)
    spread, variance = mean * (1 - mean), float(values.var())
    effective = float(count)
    if spread > 1e-12:
        effective = count * draws if variance <= spread / draws else count * spread / variance
    return Estimate(mean, *wilson(mean, effective, confidence))


def wilson(mean: float, count: float, confidence: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share seen in `count` independent draws; inside [0, 1] by construction."""
    z = _z(confidence)
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, centre - half) if mean > 0 else 0.0, min(1.0, centre + half) if mean < 1 else 1.0


def average(values: np.ndarray, confidence: float) -> Estimate:
    """Mean of any figure, value ± z standard errors; float64[prompts]."""
    mean = float(values.mean())
    return _around(mean, values - mean, float(len(values)), confidence)


def ratio(tokens: np.ndarray, forwards: np.ndarray, confidence: float) -> Estimate:
    """Σ tokens / Σ forwards over prompts; the error is that of a ratio of two sums over the same prompts (delta method)."""
    value = float(tokens.sum() / forwards.sum())
    return _around(value, tokens - value * forwards, float(forwards.sum()), confidence)


def _around(value: float, residuals: np.ndarray, total: float, confidence: float) -> Estimate:
    count = len(residuals)
    if count < 2:
        return Estimate(value, None, None)
    half = _z(confidence) * math.sqrt(count / (count - 1) * float((residuals**2).sum())) / total
    return Estimate(value, value - half, value + half)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)
