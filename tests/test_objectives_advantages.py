"""Group advantages, the signal filter, and advantages over denoising steps."""

from __future__ import annotations

import numpy as np
import pytest

from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.objectives.advantages import ADVANTAGES, group_advantages, has_signal, softmax_weights
from rlpipe.objectives.gae import gae_over_steps, place_reward


def test_zscore_reference_vector():
    got = group_advantages(np.array([1, 1, 1, 0, 0, 0, 0, 0]), "zscore")
    assert got.dtype == np.float32
    assert got == pytest.approx([1.290994] * 3 + [-0.774597] * 5, abs=1e-6)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_equal_rewards_give_exactly_zero(kind):
    """0.1 three times has a rounded mean; dividing by its rounding error would make a signal of nothing."""
    for rewards in ([0.1] * 3, [1.0], [0.0] * 4, []):
        got = group_advantages(np.array(rewards), kind)
        assert got.tolist() == [0.0] * len(rewards) and got.dtype == np.float32


def test_mean_and_leave_one_out():
    rewards = np.array([1.0, 0.0, 0.5])
    assert group_advantages(rewards, "mean").tolist() == [0.5, -0.5, 0.0]
    assert group_advantages(rewards, "leave_one_out") == pytest.approx([0.75, -0.75, 0.0])
    others = [rewards[i] - np.delete(rewards, i).mean() for i in range(3)]
    assert group_advantages(rewards, "leave_one_out") == pytest.approx(others)


def test_softmax_weights_reference_vector():
    rewards = np.array([2.0, 0.0, 1.0, 0.0])
    raised, lowered = softmax_weights(rewards)
    assert raised == pytest.approx([0.610296, 0.082595, 0.224515, 0.082595], abs=1e-6)
    assert lowered == pytest.approx([0.054065, 0.399486, 0.146963, 0.399486], abs=1e-6)
    assert group_advantages(rewards, "softmax") == pytest.approx(4 * (raised - lowered))
    shifted = softmax_weights(rewards - rewards.mean())
    assert shifted[0] == pytest.approx(raised) and shifted[1] == pytest.approx(lowered)
    assert np.isfinite(softmax_weights(np.array([1e6, -1e6]))).all()


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean zscore"):
        group_advantages(np.array([0.0, 1.0]), "z_score")


def test_rewards_that_are_not_finite_are_a_failure():
    with pytest.raises(VerifierFailed):
        group_advantages(np.array([0.0, np.nan]), "mean")
    with pytest.raises(VerifierFailed):
        has_signal(np.array([np.inf, 0.0]), 0.0, 1.0)


@pytest.mark.parametrize(
    ("rewards", "low", "high", "expected"),
    [
        ([1, 1, 1], 0.0, 1.0, False),
        ([0, 0, 0], 0.0, 1.0, False),
        ([0.3, 0.3], 0.0, 1.0, False),
        ([1, 0, 0, 0], 0.0, 1.0, True),
        ([1, 0, 0, 0], 0.25, 0.75, False),
        ([1, 1, 0, 0], 0.25, 0.75, True),
        ([1, 1, 1, 0], 0.25, 0.75, False),
        ([0.1, 0.2], 0.25, 0.75, True),
        ([], 0.0, 1.0, False),
    ],
)
def test_has_signal(rewards, low, high, expected):
    assert has_signal(np.array(rewards, np.float32), low, high) is expected


STEPS = np.array([1, 1, 2, 3, 3, 4])
VALUES = np.array([0.2, 0.4, -0.1, 0.3, 0.5, 0.7])
TRAINABLE = np.array([True] * 5 + [False])  # the last token is padding


@pytest.mark.parametrize(
    ("gamma", "lam", "returns", "advantages"),
    [
        (1.0, 1.0, [1.5] * 5 + [0], [1.3, 1.1, 1.6, 1.2, 1.0, 0]),
        (1.0, 0.0, [1.5] * 5 + [0], [-0.3, -0.5, 0.5, 1.2, 1.0, 0]),
        (0.99, 1.0, [1.47015, 1.47015, 1.485, 1.5, 1.5, 0], [1.27015, 1.07015, 1.585, 1.2, 1.0, 0]),
    ],
)
def test_gae_reference_vectors(gamma, lam, returns, advantages):
    rewards = place_reward(1.5, STEPS, TRAINABLE)
    assert rewards.tolist() == [0, 0, 0, 1.5, 1.5, 0]
    got = gae_over_steps(rewards, VALUES, STEPS, TRAINABLE, gamma, lam)
    assert got[0].dtype == got[1].dtype == np.float32
    assert got[0] == pytest.approx(returns, abs=1e-6) and got[1] == pytest.approx(advantages, abs=1e-6)


def test_gae_reference_vector_of_token_rewards():
    returns, advantages = gae_over_steps(np.array([0, 0, 1, 0, -1, 9]), VALUES, STEPS, TRAINABLE, 0.99, 1.0)
    assert returns == pytest.approx([0.49995, 0.49995, 0.505, 0, -1, 0], abs=1e-6)
    assert advantages == pytest.approx([0.29995, 0.09995, 0.605, -0.3, -1.5, 0], abs=1e-6)


def test_gae_properties_on_random_responses():
    rng = np.random.default_rng(0)
    for _ in range(100):
        length = int(rng.integers(1, 30))
        steps, values = rng.integers(1, 10, length), rng.normal(size=length)
        trainable = rng.random(length) < 0.8
        rewards = place_reward(0.7, steps, trainable)
        returns, advantages = gae_over_steps(rewards, values, steps, trainable, 1.0, 1.0)
        assert returns == pytest.approx(np.where(trainable, 0.7, 0.0), abs=1e-6)
        assert advantages == pytest.approx(np.where(trainable, 0.7 - values, 0.0), abs=1e-6)
        _, one_step = gae_over_steps(rewards, values, steps, trainable, 1.0, 0.0)
        later = [sorted({s for s in steps[trainable] if s > step})[:1] for step in steps]
        following = np.array([values[trainable & (steps == s[0])].mean() if s else 0.0 for s in later])
        assert one_step == pytest.approx(np.where(trainable, rewards - values + following, 0.0), abs=1e-6)


def test_nothing_trainable():
    none = np.zeros(3, bool)
    assert place_reward(1.0, np.array([1, 2, 3]), none).tolist() == [0, 0, 0]
    returns, advantages = gae_over_steps(np.ones(3), np.ones(3), np.array([1, 2, 3]), none, 1.0, 1.0)
    assert returns.tolist() == advantages.tolist() == [0, 0, 0]
