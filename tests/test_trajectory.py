"""The record: step map, event log, replay of states, flat columns."""

import numpy as np
import pytest

from rlpipe.errors import NoStepMap
from rlpipe.trajectory import COMMIT, EDIT, REMASK, EventLog, Predictions, Trajectories, Trajectory

MASK = 99


def trajectory(events: list[tuple[int, int, int, int]], length: int = 4, **changes) -> Trajectory:
    """events: (step, position, token, kind)."""
    columns = np.array(events, np.int32).T
    final = np.full(length, MASK, np.int32)
    for _, position, token, kind in events:
        final[position] = MASK if kind == REMASK else token
    count = len(events)
    log = EventLog(
        step=columns[0],
        position=columns[1],
        token=columns[2],
        kind=columns[3].astype(np.int8),
        logp=-np.arange(count, dtype=np.float32),
        logp_t1=np.zeros(count, np.float32),
        confidence=np.ones(count, np.float32),
        forced=np.zeros(count, bool),
    )
    values = dict(
        uid="toy/0", sample=1, seed=2**62, prompt_ids=np.array([5, 6], np.int32), response_ids=final, valid_len=3,
        block_size=2, versions=np.array([7, 8], np.int32), stop="eos", events=log, decoder={"select": "static"},
    )  # fmt: skip
    return Trajectory(**values | changes)


MONOTONE = [(0, 1, 11, COMMIT), (0, 2, 12, COMMIT), (1, 0, 10, COMMIT), (2, 3, 13, COMMIT)]


def test_step_map_is_one_based_and_states_replay():
    record = trajectory(MONOTONE)
    assert record.step_map().tolist() == [2, 1, 1, 3]
    assert record.at_commit("logp").tolist() == [-2, 0, -1, -3]
    assert record.state(0, MASK).tolist() == [MASK] * 4
    assert record.state(1, MASK).tolist() == [MASK, 11, 12, MASK]
    assert record.state(3, MASK).tolist() == record.response_ids.tolist() == [10, 11, 12, 13]
    assert record.version == 7


def test_loss_mask_needs_validity_and_a_commit():
    assert trajectory(MONOTONE).loss_mask().tolist() == [True, True, True, False]
    assert trajectory(MONOTONE[:2]).loss_mask().tolist() == [False, True, True, False]


@pytest.mark.parametrize("event", [(3, 1, MASK, REMASK), (3, 1, 55, EDIT), (3, 1, 11, COMMIT)])
def test_a_changed_token_has_an_event_log_but_no_step_map(event):
    record = trajectory([*MONOTONE, event])
    with pytest.raises(NoStepMap, match="toy/0#1"):
        record.step_map()
    assert record.state(4, MASK)[1] == record.response_ids[1]


def test_columns_give_the_records_back():
    rows = [trajectory(MONOTONE), trajectory(MONOTONE[:3], length=6, sample=2, exact=False, stop="length")]
    store = Trajectories.of(rows)
    assert len(store) == 2 and store[-1].sample == 2
    for want, got in zip(rows, store, strict=True):
        for name in ("uid", "sample", "seed", "valid_len", "block_size", "stop", "exact", "decoder"):
            assert getattr(want, name) == getattr(got, name)
        for name in ("prompt_ids", "response_ids", "versions"):
            np.testing.assert_array_equal(getattr(want, name), getattr(got, name))
        for name in EventLog.DTYPES:
            np.testing.assert_array_equal(getattr(want.events, name), getattr(got.events, name))


def test_store_survives_disk_and_selection(tmp_path):
    store = Trajectories.of([trajectory(MONOTONE, sample=i) for i in range(3)])
    store.save(tmp_path / "t.npz")
    loaded = Trajectories.load(tmp_path / "t.npz")
    assert [t.sample for t in loaded.select([2, 0])] == [2, 0]
    assert [t.sample for t in Trajectories.concat([loaded, store])] == [0, 1, 2, 0, 1, 2]
    assert all(column.dtype != object for column in loaded.columns.values())


def test_one_store_has_one_decoder():
    with pytest.raises(ValueError, match="decoder"):
        Trajectories.of([trajectory(MONOTONE), trajectory(MONOTONE, decoder={"select": "threshold"})])
    with pytest.raises(ValueError, match="no trajectories"):
        Trajectories.of([])


def predicted(steps: int, length: int = 4) -> Predictions:
    tokens = np.arange(steps * length, dtype=np.int32).reshape(steps, length)
    return Predictions(step=np.arange(steps, dtype=np.int32) * 2, tokens=tokens, confidence=(tokens / 100).astype(np.float32))


def test_predictions_and_step_rewards_are_kept_row_by_row(tmp_path):
    rows = [
        trajectory(MONOTONE, predictions=predicted(3), step_rewards=np.array([0, 0.5, 1], np.float32)),
        trajectory(MONOTONE, sample=2),
        trajectory(MONOTONE, length=6, sample=3, predictions=predicted(1, 6)),
    ]
    store = Trajectories.of(rows)
    store.save(tmp_path / "t.npz")
    for got in (store, Trajectories.load(tmp_path / "t.npz"), Trajectories.concat([store.select([0, 1]), store.select([2])])):
        assert got[1].predictions is None and got[1].step_rewards is None and got[2].step_rewards is None
        np.testing.assert_array_equal(got[0].step_rewards, rows[0].step_rewards)
        for i in (0, 2):
            for name, dtype in Predictions.DTYPES.items():
                np.testing.assert_array_equal(getattr(got[i].predictions, name), getattr(rows[i].predictions, name))
                assert getattr(got[i].predictions, name).dtype == dtype
    assert not any("predictions" in name or "step_rewards" in name for name in store.select([1]).columns)
    assert store[0].predictions.nbytes == 3 * 4 + 3 * 4 * 8


@pytest.mark.parametrize("changes", [{"tokens": np.zeros((2, 4))}, {"confidence": np.zeros((3, 5))}, {"step": np.arange(2)}])
def test_predictions_that_do_not_fit_together_are_refused(changes):
    fields = {name: getattr(predicted(3), name) for name in Predictions.DTYPES}
    with pytest.raises(ValueError, match="predictions disagree"):
        Predictions(**fields | changes)


def test_states_replay_a_token_at_a_time():
    """The vectorised replay is a walk through the events, with tokens taken back and put again, also within a step."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        events = []
        for step in range(6):
            for position in rng.permutation(5)[: rng.integers(0, 5)]:
                kind = int(rng.choice([COMMIT, REMASK, EDIT]))
                events.append((step, int(position), MASK if kind == REMASK else int(rng.integers(1, 50)), kind))
        if not events:
            continue
        record = trajectory(events, length=5)
        for step in range(8):
            canvas = [MASK] * 5
            for when, position, token, kind in events:
                if when < step:
                    canvas[position] = MASK if kind == REMASK else token
            assert record.state(step, MASK).tolist() == canvas
