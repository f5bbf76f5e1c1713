"""The parity gauge."""

import numpy as np
import pytest

from rlpipe import parity
from rlpipe.config import ParityConfig
from rlpipe.errors import ParityError


def test_gauge_by_hand():
    rollout = np.array([-1.0, -2.0, -0.5, -3.0], np.float32)
    learner = rollout + np.array([0.0, 0.3, -0.1, 0.0], np.float32)
    metrics = parity.gauge(learner, rollout, 0.2, 0.2)
    assert metrics["parity/max_abs_delta"] == pytest.approx(0.3, abs=1e-6)
    assert metrics["parity/mean_abs_delta"] == pytest.approx(0.1, abs=1e-6)
    assert metrics["parity/mean_kl"] == pytest.approx((np.exp(0.3) - 1.3 + np.exp(-0.1) - 0.9) / 4, abs=1e-6)
    assert metrics["parity/clipped_share"] == 0.25 and metrics["parity/tokens"] == 4


def test_equal_is_zero_and_nothing_is_nothing():
    same = np.linspace(-5, 0, 7, dtype=np.float32)
    assert parity.gauge(same, same, 0.2, 0.2)["parity/max_abs_delta"] == 0
    assert parity.gauge(same[:0], same[:0], 0.2, 0.2) == {"parity/tokens": 0.0}


def test_the_limit_stops_the_run_and_says_where_to_look():
    bad = parity.gauge(np.array([0.0], np.float32), np.array([-0.01], np.float32), 0.2, 0.2)
    with pytest.raises(ParityError, match=r"step 7.*0.01 nats.*parity.max_abs_delta=0.001"):
        parity.check(bad, ParityConfig(max_abs_delta=1e-3), 7)
    parity.check(bad, ParityConfig(max_abs_delta=0.1), 7)
    parity.check(bad, ParityConfig(max_abs_delta=0), 7)
    with pytest.raises(ParityError):
        parity.check({"parity/max_abs_delta": float("nan"), "parity/mean_kl": 0.0}, ParityConfig(), 1)


def test_diversity_counts_distinct_responses():
    assert parity.diversity([["a", "a"], ["a", "b"]]) == 0.75
