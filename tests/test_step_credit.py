"""Step credit: published vectors, a plain loop, the equality with replay, and the rows of real rollouts."""

import dataclasses

import numpy as np
import pytest
from test_objectives_planner import trajectory_of
from test_predictions import recorded
from test_trajectory import MASK, MONOTONE, trajectory
from tiny_models import prompts, tiny

from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.objectives.planner import Replay
from rlpipe.objectives.step_credit import ChosenSteps, batch_advantages, choose_steps, step_advantages, step_credit
from rlpipe.trajectory import COMMIT, REMASK, Predictions

PUBLISHED = np.array([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], float)
ADVANTAGES = [[0.5772, 0.872757, -0.5773, -0.9999], [0.5772, 0.218189, 1.154601, 0.9999], [-1.154401, -1.090947, -0.5773, 0]]


def test_credit_is_the_published_vector():
    found = [step_credit(row) for row in PUBLISHED]
    np.testing.assert_allclose(found, [[5 / 3, 2.5, 1, 0], [5 / 3, 2, 3, 2], [1, 1, 1, 1]], atol=1e-6)


def test_advantages_and_choice_are_the_published_vectors():
    found = step_advantages(PUBLISHED)
    np.testing.assert_allclose(found, ADVANTAGES, atol=1e-5)
    np.testing.assert_allclose(np.abs(found).sum(0), [2.308801, 2.181893, 2.309201, 1.9998], atol=1e-5)
    assert [steps.tolist() for steps in choose_steps(found, 2)] == [[0, 2]] * 3
    assert [steps.tolist() for steps in choose_steps(found, 4)] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2]], "none at step 3"


def loop_advantages(rewards: list[np.ndarray]) -> list[list[float]]:
    """Response by response, step by step."""
    credit = []
    for r in (np.asarray(row, float).tolist() for row in rewards):
        own = []
        for t in range(len(r)):
            later = r[t + 1 :]
            own.append(r[t] - (r[t - 1] if t else 0.0) + 1 + (sum(later) / len(later) if later else r[t]))
        credit.append(own)
    out = [[0.0] * len(own) for own in credit]
    for t in range(max(map(len, credit))):
        column = [(i, own[t]) for i, own in enumerate(credit) if t < len(own)]
        values = np.array([value for _, value in column])
        if len(values) > 1 and np.ptp(values) > 1e-9:
            for i, value in column:
                out[i][t] = (value - values.mean()) / (values.std(ddof=1) + 1e-4)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_ragged_groups_are_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    group = [rng.choice([0.0, 0.5, 1.0], rng.integers(1, 9)).astype(np.float32) for _ in range(rng.integers(1, 6))]
    found = step_advantages(group)
    assert [(len(row), row.dtype) for row in found] == [(len(row), np.float32) for row in group]
    for row, want in zip(found, loop_advantages(group), strict=True):
        np.testing.assert_allclose(row, want, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_what_does_not_differ_teaches_nothing_exactly(value):
    for group in (np.full((4, 7), value), [np.full(n, value) for n in (3, 1, 8, 5)], [np.array([value, 1.0, 0.0])]):
        assert not any(row.any() for row in step_advantages(group))
    assert step_advantages([]) == [] and [len(row) for row in step_advantages([np.zeros(0)] * 2)] == [0, 0]


def test_rewards_must_be_finite():
    with pytest.raises(VerifierFailed, match="nan"):
        step_advantages([np.array([0.0, np.nan]), np.array([1.0])])


def test_dead_steps_are_never_chosen():
    a = np.array([0.0, 2.0, 0.0, -1.0], np.float32)
    assert [steps.tolist() for steps in choose_steps([a, -a, np.zeros(4, np.float32)], 4)] == [[1, 3], [1, 3], []]
    assert [steps.tolist() for steps in choose_steps([a, a[:2]], 8)] == [[1, 3], [1]]
    assert [steps.tolist() for steps in choose_steps([np.zeros(3, np.float32)] * 2, 2)] == [[], []]
    equal = np.ones(6, np.float32)
    assert choose_steps([equal], 3)[0].tolist() == [0, 1, 2], "the earlier of equals"


def test_random_steps_are_shared_alive_and_come_from_the_generator():
    a = np.ones(9, np.float32)
    a[4] = 0
    first = choose_steps([a, a], 3, "random", np.random.default_rng(1))
    again = choose_steps([a, a], 3, "random", np.random.default_rng(1))
    assert first[0].tolist() == first[1].tolist() == again[0].tolist() and len(set(first[0])) == 3
    rng = np.random.default_rng(0)
    seen = np.bincount(np.concatenate([choose_steps([a], 3, "random", rng)[0] for _ in range(400)]), minlength=9)
    assert seen[4] == 0 and (np.abs(seen[a > 0] - 150) < 50).all()
    assert [steps.tolist() for steps in choose_steps([a, a[:3]], 1, "all")] == [list(range(9)), [0, 1, 2]]


def with_predictions(record, rewards, stride: int = 1):
    """Predictions that agree with the record where it commits, and are noise elsewhere."""
    rng = np.random.default_rng(len(rewards))
    count = int(record.events.step.max()) + 1
    steps = np.unique([*range(0, count, stride), count - 1]).astype(np.int32)
    shape = (len(steps), record.response_len)
    tokens, confidence = rng.integers(1, 40, shape), rng.uniform(0.1, 1.0, shape).astype(np.float32)
    for row, step in enumerate(steps):
        before, after = record.state(step, MASK), record.state(step + 1, MASK)
        tokens[row] = np.where(before != MASK, before, np.where(after != MASK, after, tokens[row]))
        confidence[row, before != MASK] = 0
    made = Predictions(step=steps, tokens=tokens.astype(np.int32), confidence=confidence)
    return dataclasses.replace(record, predictions=made, step_rewards=np.asarray(rewards, np.float32)[steps])


def group_of(rng: np.random.Generator, uid: str, size: int = 3) -> list:
    found = []
    for _ in range(size):
        record = trajectory_of(rng.integers(1, 6, 12), valid_len=int(rng.integers(3, 13)))
        found.append(dataclasses.replace(with_predictions(record, rng.integers(0, 2, 5)), uid=uid))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_committed_tokens_of_all_steps_are_the_replay(seed):
    rng = np.random.default_rng(seed)
    batch = group_of(rng, "a") + group_of(rng, "b")
    planner = ChosenSteps(score="committed", weight="none", scale="none", pick="all")
    assert planner.replays_rollout and planner.needs_step_rewards and not ChosenSteps().replays_rollout
    for record, rows, advantage in zip(batch, planner.plan_all(batch, rng), batch_advantages(batch), strict=True):
        want = Replay(shrink=1, tail=True).plan(record, rng)
        for name in ("masked", "scored", "step"):
            np.testing.assert_array_equal(getattr(rows, name), getattr(want, name))
        final = np.broadcast_to(record.response_ids, rows.scored.shape)
        np.testing.assert_array_equal(rows.targets[rows.scored], final[rows.scored])
        np.testing.assert_array_equal(rows.credit, advantage[rows.step])
        assert rows.weight is None


def test_replay_equality_holds_with_presets_and_positions_never_committed():
    record = trajectory_of([2, 0, 1, 3, 3, 1])
    kind = record.events.kind.copy()
    kind[-1] = 3  # filled by rule at the last step
    record = dataclasses.replace(record, events=dataclasses.replace(record.events, kind=kind))
    rows = ChosenSteps(score="committed", weight="none", scale="none", pick="all").plan_all(
        [with_predictions(record, [0, 1, 0])], np.random.default_rng(0)
    )[0]
    want = Replay(tail=True).plan(record, np.random.default_rng(0))
    np.testing.assert_array_equal(rows.masked, want.masked)
    np.testing.assert_array_equal(rows.scored, want.scored)


def test_a_row_is_the_state_the_prediction_and_its_advantage():
    batch = [
        dataclasses.replace(with_predictions(trajectory_of([1, 2, 3, 4]), row), sample=i) for i, row in enumerate(PUBLISHED)
    ]
    for rows, record, advantage in zip(ChosenSteps(steps=2).plan_all(batch, None), batch, ADVANTAGES, strict=True):
        assert rows.step.tolist() == [0, 2]
        assert rows.masked.tolist() == rows.scored.tolist() == [[True] * 4, [False, False, True, True]]
        np.testing.assert_array_equal(rows.targets, record.predictions.tokens[[0, 2]])
        np.testing.assert_array_equal(rows.weight, record.predictions.confidence[[0, 2]])
        np.testing.assert_allclose(rows.credit, np.array(advantage)[[0, 2]] * [4 / 4.0001, 4 / 2.0001], atol=1e-4)
    capped = ChosenSteps(steps=2, scale_cap=1.5).plan_all(batch, None)[1]
    np.testing.assert_allclose(capped.credit, [ADVANTAGES[1][0] * 4 / 4.0001, ADVANTAGES[1][2] * 1.5], atol=1e-4)
    plain = ChosenSteps(steps=2, scale="none", weight="none").plan_all(batch, None)[1]
    np.testing.assert_allclose(plain.credit, [ADVANTAGES[1][0], ADVANTAGES[1][2]], atol=1e-5)
    assert plain.weight is None
    assert len(ChosenSteps(steps=4).plan_all(batch, None)[2]) == 3, "the third response has no advantage at the last step"


def test_dead_groups_have_no_rows_and_groups_do_not_mix():
    rng = np.random.default_rng(3)
    dead = [dataclasses.replace(with_predictions(trajectory_of([1, 2, 3]), [1, 1, 1]), uid="dead") for _ in range(2)]
    live = [dataclasses.replace(with_predictions(trajectory_of([1, 2, 3]), row), uid="live") for row in ([0, 0, 1], [0, 0, 0])]
    rows = ChosenSteps().plan_all([dead[0], live[0], dead[1], live[1]], rng)
    assert [len(part) for part in rows] == [0, 3, 0, 3]
    assert rows[0].masked.shape == rows[0].weight.shape == rows[0].targets.shape == (0, 3) and rows[0].credit.shape == (0,)
    np.testing.assert_allclose(rows[1].credit, -rows[3].credit, rtol=1e-6)


def test_strided_predictions_give_rows_at_recorded_steps_only():
    batch = [with_predictions(trajectory_of([1, 2, 3, 4, 5, 6]), rewards, stride=2) for rewards in (np.arange(6), np.zeros(6))]
    rows = ChosenSteps(stride=2).plan_all(batch, None)[0]
    assert batch[0].predictions.step.tolist() == [0, 2, 4, 5]
    assert set(rows.step) <= {0, 2, 4, 5} and (rows.masked.sum(1) == 6 - rows.step).all()


def test_states_come_from_the_event_log():
    """A re-masked token is scored again, and the row shows what stood there at the time."""
    events = [*MONOTONE[:2], (1, 0, 10, COMMIT), (1, 1, MASK, REMASK), (2, 1, 55, COMMIT), (2, 3, 13, COMMIT)]
    batch = [with_predictions(trajectory(events, block_size=0, sample=i), row) for i, row in enumerate(np.eye(3)[:2])]
    rows = ChosenSteps(score="committed", pick="all", weight="none").plan_all(batch, None)[0]
    assert rows.step.tolist() == [0, 1, 2]
    assert np.where(rows.masked, MASK, rows.targets).tolist() == [[MASK] * 4, [MASK, 11, 12, MASK], [10, MASK, 12, MASK]]
    assert rows.scored.tolist() == [[False, True, True, False], [True, False, False, False], [False, True, False, True]]
    assert rows.targets[2, 1] == batch[0].response_ids[1] == 55 and batch[0].response_ids[1] != rows.targets[1, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score": "comitted"}, "did you mean committed"),
        ({"weight": "conf"}, "did you mean confidence"),
        ({"scale": "len"}, "did you mean length"),
        ({"pick": "tpo"}, "did you mean top"),
        ({"steps": 0}, "at least 1"),
        ({"stride": 0}, "at least 1"),
        ({"scale_cap": -1.0}, "not negative"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ChosenSteps(**options)


def test_missing_rewards_are_refused():
    record = with_predictions(trajectory_of([1, 2, 3]), [0, 1, 1])
    for broken in (
        trajectory_of([1, 2]),
        dataclasses.replace(record, step_rewards=None),
        dataclasses.replace(record, step_rewards=record.step_rewards[:2]),
    ):
        with pytest.raises(ValueError, match="needs predictions and a reward"):
            ChosenSteps().plan_all([broken], np.random.default_rng(0))


@pytest.mark.parametrize("decoder", [{}, {"block_size": 4}, {"edit": "rcr", "schedule": "linear", "steps": 4}])
def test_rows_of_real_rollouts(decoder):
    """The rows show what the sampler saw: at every step the tokens that it did not draw are the state's."""
    model, tokenizer = tiny("full")
    found, _ = recorded(model, prompts(tokenizer, 6), max_tokens=11, **decoder)
    rng = np.random.default_rng(0)
    batch = [
        dataclasses.replace(t, uid=f"p{i % 2}", step_rewards=rng.integers(0, 2, len(t.predictions)).astype(np.float32))
        for i, t in enumerate(found)
    ]
    planned = ChosenSteps(steps=5).plan_all(batch, rng)
    assert sum(len(rows) for rows in planned) > 6
    for record, rows in zip(batch, planned, strict=True):
        for r, step in enumerate(rows.step):
            state = record.state(step, -1)
            np.testing.assert_array_equal(rows.masked[r], state == -1)
            np.testing.assert_array_equal(rows.targets[r][~rows.masked[r]], state[~rows.masked[r]])
            assert (rows.weight[r][rows.masked[r]] > 0).all()
