"""Values to advantages: with γ = λ = 1 and values of zero nothing changes; a gate; tokens scored twice are refused."""

import dataclasses

import numpy as np
import pytest
from test_learner_samples import step_plan

from rlpipe.errors import ConfigError, RlpipeError
from rlpipe.learner.credit import finalize_value, step_dues, with_values

PLAIN = {"gamma": 1.0, "lam": 1.0, "shrink": 1, "gate": -np.inf}


def rewards_of(plan, count: int) -> np.ndarray:
    """The advantages that the plan was made with, by trajectory."""
    found = np.zeros(count, np.float32)
    for sample, owner in zip(plan.samples, plan.owner, strict=True):
        found[owner] = sample.advantage[0]
    return found


@pytest.mark.parametrize("kind", ("block", "full"))
def test_zero_values_leave_the_advantages_as_they_were(kind):
    plan, records = step_plan(kind)
    values = [np.zeros(s.num_scored, np.float32) for s in plan.samples]
    valued, metrics = with_values(plan, records, rewards_of(plan, len(records)), values, **PLAIN)
    for before, after in zip(plan.samples, valued.samples, strict=True):
        np.testing.assert_array_equal(before.advantage, after.advantage)
        np.testing.assert_array_equal(before.advantage, after.returns)
    assert metrics["value/explained_variance"] == 0.0 and metrics["value/in_use"] == 1.0


def test_advantages_are_the_reward_less_the_value_and_good_values_explain_the_returns():
    plan, records = step_plan("block")
    rewards = rewards_of(plan, len(records))
    noise = np.random.default_rng(0)
    values = [
        (rewards[o] + 0.1 * noise.normal(size=s.num_scored)).astype(np.float32)
        for s, o in zip(plan.samples, plan.owner, strict=True)
    ]
    valued, metrics = with_values(plan, records, rewards, values, **PLAIN)
    for sample, value, owner in zip(valued.samples, values, plan.owner, strict=True):
        np.testing.assert_allclose(sample.advantage, rewards[owner] - value, atol=1e-5)
    assert metrics["value/explained_variance"] > 0.9
    assert with_values(plan, records, rewards, values, **PLAIN | {"lam": 0.5})[0].samples[0].advantage.std() > 0


def test_below_the_gate_the_policy_keeps_its_group_advantages_and_the_value_model_its_returns():
    plan, records = step_plan("block")
    values = [np.ones(s.num_scored, np.float32) for s in plan.samples]
    valued, metrics = with_values(plan, records, rewards_of(plan, len(records)), values, **PLAIN | {"gate": 0.3})
    assert metrics["value/in_use"] == 0.0
    for before, after in zip(plan.samples, valued.samples, strict=True):
        np.testing.assert_array_equal(before.advantage, after.advantage)
        assert len(after.returns) == after.num_scored


def test_a_token_with_several_values_is_refused():
    plan, records = step_plan("full", count=2, updates=1, group=2)
    twice = dataclasses.replace(
        plan, samples=plan.samples * 2, owner=plan.owner * 2, updates=[list(range(2 * len(plan.samples)))]
    )
    values = [np.zeros(s.num_scored, np.float32) for s in twice.samples]
    with pytest.raises(ConfigError, match="once"):
        with_values(twice, records, np.ones(2, np.float32), values, **PLAIN)


def test_a_lost_value_model_is_reported():
    good = {"sums": {"value_loss": 0.5}, "grad_norm": 1.0, "lr": 1e-3}
    assert finalize_value([good, good])["value/loss"] == 0.5
    assert finalize_value([]) == {}
    with pytest.raises(RlpipeError, match=r"value\.lr"):
        finalize_value([good | {"grad_norm": float("nan")}])


def test_step_dues_add_up_to_the_reward_relative_to_the_group():
    from rlpipe.trajectory import Predictions, replace

    _, records = step_plan("full", count=4, updates=1, group=2)
    rng, judged = np.random.default_rng(3), []
    for record in records:
        count = int(record.events.step.max()) + 1
        shape = (count, record.response_len)
        step = np.arange(count, dtype=np.int32)
        made = Predictions(step=step, tokens=np.zeros(shape, np.int32), confidence=np.zeros(shape, np.float32))
        judged.append(replace(record, predictions=made, step_rewards=rng.integers(0, 2, count).astype(np.float32)))
    for record in judged:
        steps, trainable = record.step_map(), record.loss_mask()
        due = step_dues(record, steps, trainable, 0.25)
        paid = [due[trainable & (steps == step)][0] for step in np.unique(steps[trainable])]
        assert sum(paid) == pytest.approx(record.step_rewards[-1] - 0.25)
        if record.valid_len == record.response_len:
            np.testing.assert_allclose(paid, np.diff(record.step_rewards, prepend=0.25))
    plan = step_plan("full", count=4, updates=1, group=2)[0]
    values = [np.zeros(s.num_scored, np.float32) for s in plan.samples]
    valued, _ = with_values(plan, judged, np.ones(4, np.float32), values, **PLAIN | {"stepwise": True})
    first = next(s for s, owner in zip(valued.samples, plan.owner, strict=True) if owner == 0)
    group = np.mean([record.step_rewards[-1] for record in judged[:2]])
    assert first.returns[0] == pytest.approx(judged[0].step_rewards[-1] - group, abs=1e-6)
