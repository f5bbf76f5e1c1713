"""The parity gauge."""

import numpy as np
import pytest

from rlpipe import parity
from rlpipe.config import ParityConfig
from rlpipe.errors import ParityError


def test_a_mean_ratio_far_from_one_is_said():
    assert parity.doubts({}) == "" == parity.doubts({"parity/stale_ratio": 1.04, "parity/stale_ratio_error": 0.01})
    assert "1.060 ± 0.010" in parity.doubts({"parity/stale_ratio": 1.06, "parity/stale_ratio_error": 0.01})


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


def test_every_token_is_measured_once_by_what_drew_it():
    """The policy itself, another law under the same weights, older weights with either."""
    rollout = np.log(np.array([0.5, 0.25, 0.2, 0.1, 0.4], np.float32))
    learner = rollout + np.log(np.array([1.0, 1.1, 0.5, 1.5, 0.9], np.float32))
    exact, lag = np.array([True, False, False, False, False]), np.array([0, 0, 1, 1, 2])
    metrics = parity.measure(learner, rollout, exact, lag, 0.2, 0.2)
    assert metrics["parity/tokens"] == 1 and metrics["parity/max_abs_delta"] == 0
    assert metrics["parity/gap_tokens"] == 1 and metrics["parity/gap_max_abs"] == pytest.approx(np.log(1.1), rel=1e-5)
    assert metrics["parity/stale_tokens"] == 3
    assert metrics["parity/stale_gap_1"] == pytest.approx(np.log(0.5 * 1.5) / 2, rel=1e-5)
    assert metrics["parity/stale_gap_2"] == pytest.approx(np.log(0.9), rel=1e-5)
    assert metrics["parity/stale_ratio"] == pytest.approx((0.5 + 1.5 + 0.9) / 3, rel=1e-5)
    same = np.array([True] * 5)
    assert parity.measure(learner, rollout, same, lag * 0, 0.2, 0.2) == parity.gauge(learner, rollout, 0.2, 0.2)


def test_the_mean_ratio_of_stale_tokens_is_one_within_its_error():
    rng = np.random.default_rng(0)
    old, new = (logits - np.log(np.exp(logits).sum()) for logits in rng.normal(size=(2, 6)))
    drawn = rng.choice(6, 20000, p=np.exp(old))
    metrics = parity.measure(new[drawn], old[drawn], drawn < 0, np.full(len(drawn), 3), 0.2, 0.2)
    assert abs(metrics["parity/stale_ratio"] - 1) < 4 * metrics["parity/stale_ratio_error"] < 0.1
    assert metrics["parity/stale_gap_3"] == pytest.approx(-(np.exp(old) * (old - new)).sum(), abs=0.05)
    wrong = parity.measure(new[drawn] + 0.2, old[drawn], drawn < 0, np.full(len(drawn), 3), 0.2, 0.2)
    assert wrong["parity/stale_ratio"] - 1 > 4 * wrong["parity/stale_ratio_error"]


def test_diversity_counts_distinct_responses():
    assert parity.diversity([["a", "a"], ["a", "b"]]) == 0.75
