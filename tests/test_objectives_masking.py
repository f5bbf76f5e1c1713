"""Planners that mask the final answer anew: closed forms, exact expectations over their draws, what they leave alone."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from test_objectives import trajectory_of

from rlpipe.config import AlgoConfig
from rlpipe.errors import ConfigError, NoStepMap
from rlpipe.objective_presets import algo_settings
from rlpipe.objectives.masking import BlockMasks, ComplementaryMasks, CoupledMasks, random_part, select_scored
from rlpipe.objectives.objective import build_objective
from rlpipe.objectives.planner import Replay, counted_tokens, plan_replay
from rlpipe.objectives.units import join
from rlpipe.trajectory import PRESET, REMASK, EventLog, Trajectory, replace

MASKERS = (CoupledMasks(), ComplementaryMasks(), ComplementaryMasks(1, False), BlockMasks(2, 3))
STEPS = [2, 1, 4, 3, 8, 6, 5, 7]


def with_events(trajectory: Trajectory, **columns) -> Trajectory:
    own = {name: getattr(trajectory.events, name) for name in EventLog.DTYPES}
    return replace(trajectory, events=EventLog(**own | columns))


def per_position(rows, values) -> np.ndarray:
    """Sum of values [R, L] of the scored entries of each position."""
    return np.where(rows.scored, values, 0).sum(0)


@pytest.mark.parametrize("planner", MASKERS)
@pytest.mark.parametrize("block_size", (0, 4))
def test_rows_mask_what_they_score_and_all_that_does_not_count(planner, block_size):
    trajectory = replace(trajectory_of([*STEPS, 9, 10, 11, 12], block_size), valid_len=7)
    kind, step = trajectory.events.kind.copy(), trajectory.events.step.copy()
    kind[trajectory.events.position == 1], step[trajectory.events.position == 1] = PRESET, -1
    trajectory = with_events(trajectory, kind=kind, step=step)
    counted = [i != 1 for i in range(7)] + [False] * 5
    assert counted_tokens(trajectory).tolist() == counted
    for seed in range(50):
        rows = planner.plan(trajectory, np.random.default_rng(seed))
        assert rows.scored.any(1).all() and not rows.scored[:, ~np.array(counted)].any()
        assert len(rows) or planner == ComplementaryMasks(1, False), "only a single part may be empty"
        assert (rows.masked == rows.scored)[:, counted].all(), "of the tokens that count, exactly the scored ones are hidden"
        assert rows.masked[:, 7:].all() and not rows.masked[:, 1].any() and (rows.step == -1).all()
        assert (rows.coefficient[rows.scored] > 0).all() and (rows.coefficient[~rows.scored] == 0).all()
        again = planner.plan(trajectory, np.random.default_rng(seed))
        assert np.array_equal(again.scored, rows.scored) and np.array_equal(again.coefficient, rows.coefficient)


@pytest.mark.parametrize("planner", MASKERS)
def test_no_step_map_is_needed_and_nothing_to_score_gives_no_rows(planner):
    trajectory = trajectory_of([1, 2, 3])
    log = {name: getattr(trajectory.events, name) for name in EventLog.DTYPES}
    log = {name: np.append(column, column[-1:]) for name, column in log.items()}
    log["position"][-1], log["kind"][-1], log["step"][-1] = 0, REMASK, 3
    taken_back = with_events(trajectory, **log)
    with pytest.raises(NoStepMap):
        plan_replay(taken_back)
    rows = planner.plan(taken_back, np.random.default_rng(0))
    assert rows.masked[:, 0].all() and not rows.scored[:, 0].any()
    assert len(planner.plan(replace(trajectory, valid_len=0), np.random.default_rng(0))) == 0


@pytest.mark.parametrize("planner", MASKERS)
def test_planning_leaves_global_generators_untouched(planner):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    planner.plan(trajectory_of(STEPS), np.random.default_rng(0))
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("block_size", (0, 4))
def test_coupled_masks_are_complements_weighed_by_their_probability(block_size):
    trajectory, levels = trajectory_of(STEPS, block_size), set()
    for seed in range(300):
        rows = CoupledMasks().plan(trajectory, np.random.default_rng(seed))
        assert rows.scored[0].all() and (rows.scored[1:].sum(0) == 1).all(), "every token exactly twice"
        assert rows.coefficient[0].tolist() == [0.5] * 8
        for block in (slice(0, 4), slice(4, 8)) if block_size else (slice(0, 8),):
            found = [0.5 / rows.coefficient[1, i] if rows.scored[1, i] else 1 - 0.5 / rows.coefficient[-1, i] for i in range(8)]
            assert np.ptp(found[block]) < 1e-6 and 0.2 <= found[block][0] <= 0.8
            levels.add(round(found[block][0], 6))
    assert len(levels) == (600 if block_size else 300)


def test_coupled_units_are_unbiased_in_the_masks():
    """Given t, a token's two coefficients are 1/2 and 1/2 on average: 1/2 · P(in M) / t and 1/2 · P(in C) / (1 - t)."""
    trajectory, planner = trajectory_of([1, 2, 3, 4]), CoupledMasks(0.3, 0.3)
    total, count = np.zeros((3, 4)), 4000
    for seed in range(count):
        rows = planner.plan(trajectory, np.random.default_rng(seed))
        part = rows.coefficient.shape[0] == 3
        total += rows.coefficient if part else 0  # one of M and C is empty now and then: those rows are left out
        if not part:
            total[0] += 0.5
            total[1 if rows.coefficient[1, 0] > 1 else 2] += rows.coefficient[1]
    np.testing.assert_allclose(total / count, 0.5, atol=0.03)


def lower_bound(table: dict) -> float:
    """Mean over all orders of the chain-rule log-probability, for table[hidden set] = log p [L] of each token."""
    length = len(next(iter(table.values())))
    found = []
    for order in itertools.permutations(range(length)):
        found.append(sum(table[frozenset(order[i:])][order[i]] for i in range(length)))
    return float(np.mean(found))


@pytest.mark.parametrize("planner", (ComplementaryMasks(2), ComplementaryMasks(3, complement=False)))
def test_complementary_masks_estimate_the_bound_without_bias(planner):
    rng, length = np.random.default_rng(0), 4
    subsets = [frozenset(s) for k in range(1, length + 1) for s in itertools.combinations(range(length), k)]
    table = {subset: np.log(rng.uniform(0.05, 0.9, length)) for subset in subsets}
    trajectory, found = trajectory_of([1, 2, 3, 4]), []
    for seed in range(4000):
        rows = planner.plan(trajectory, np.random.default_rng(seed))
        units = join(rows, "sequence", np.zeros(length, np.int64), length)
        logp = np.concatenate([table[frozenset(np.flatnonzero(row))][row] for row in rows.scored])
        found.append(length * float((units.coefficient * logp).sum()))
        assert units.span.tolist() == [length] and len(units) == 1
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(lower_bound(table), abs=4 * error)
    assert error < 0.03


def test_complementary_masks_of_block_models_size_every_block_apart():
    """A block of n = 4 with k in the part: (n + 1) / k there, (n + 1) / (n - k) in the rest, halved, over all 8 tokens."""
    trajectory = trajectory_of(STEPS, 4)
    sizes = set()
    for seed in range(200):
        rows = ComplementaryMasks(1).plan(trajectory, np.random.default_rng(seed))
        taken = [int(rows.scored[0, :4].sum()), int(rows.scored[0, 4:].sum())]
        sizes.add(tuple(taken))
        found = per_position(rows, rows.coefficient)
        for own, block in zip(taken, (slice(0, 4), slice(4, 8)), strict=True):
            if len(rows) == 2 and 0 < own < 4:
                expected = np.where(rows.scored[0, block], 5 / own, 5 / (4 - own)) / 2 / 8
                assert found[block] == pytest.approx(expected)
    assert len(sizes) > 15, "sizes of the blocks are drawn apart"


def test_sizes_of_complementary_masks_are_stratified_and_uniform():
    trajectory, seen = trajectory_of([1, 2, 3]), []
    for seed in range(2000):
        rows = ComplementaryMasks(4, complement=False).plan(trajectory, np.random.default_rng(seed))
        sizes = sorted(rows.scored.sum(1).tolist())
        assert sizes == [1, 2, 3], "four draws of 0 … 3: each size once; the empty one scores nothing"
        seen.append(rows.scored.sum(1)[0])
    assert np.bincount(seen)[1:] / 2000 == pytest.approx([1 / 3] * 3, abs=0.05)


def test_block_masks_are_states_of_a_block_decoder():
    trajectory = replace(trajectory_of(list(range(1, 13))), valid_len=10)
    opened, drawn = [], []
    for seed in range(400):
        rows = BlockMasks(2, 4).plan(trajectory, np.random.default_rng(seed))
        assert len(rows) == 2
        first = [int(row.argmax()) // 4 for row in rows.scored]
        assert first[0] != first[1], "no block twice while there are others"
        for own, row in zip(first, rows.scored, strict=True):
            stop = min(4 * own + 4, 10)
            assert not row[: 4 * own].any() and row[stop:10].all() and row[4 * own : stop].any()
            opened.append(own)
            drawn.append((own, int(row[4 * own : stop].sum())))
        assert rows.coefficient.sum() == pytest.approx(1.0)
        assert rows.coefficient.sum(1).tolist() == pytest.approx([0.5, 0.5]), "the rows' means count alike"
    assert np.bincount(opened) / 800 == pytest.approx([1 / 3] * 3, abs=0.05)
    in_first = np.bincount([count for own, count in drawn if own == 0])[1:]
    assert in_first / in_first.sum() == pytest.approx([0.25] * 4, abs=0.08)
    assert {count for own, count in drawn if own == 2} == {1, 2}, "only two tokens of the last block count"


def test_block_masks_of_block_models_open_every_block():
    trajectory = trajectory_of(STEPS, 4)
    counts = set()
    for seed in range(100):
        rows = BlockMasks(3).plan(trajectory, np.random.default_rng(seed))
        assert len(rows) == 3 and rows.scored[:, :4].any(1).all() and rows.scored[:, 4:].any(1).all()
        counts |= set(zip(rows.scored[:, :4].sum(1).tolist(), rows.scored[:, 4:].sum(1).tolist(), strict=True))
    assert len(counts) == 16
    assert len(BlockMasks(5, 100).plan(trajectory_of([1, 2]), np.random.default_rng(0))) == 5, (
        "one block, drawn again and again"
    )


def test_random_part_takes_what_was_asked_of_each_block():
    rng = np.random.default_rng(0)
    for _ in range(200):
        length = int(rng.integers(1, 12))
        block = np.sort(rng.integers(0, 4, length))
        block = np.unique(block, return_inverse=True)[1]
        counted = rng.random(length) < 0.7
        size = np.bincount(block, counted).astype(int)
        taken = rng.integers(0, size + 1)
        part = random_part(counted, block, taken, rng)
        assert (part <= counted).all() and np.bincount(block, part).astype(int).tolist() == taken.tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: CoupledMasks(0.0, 0.5),
        lambda: CoupledMasks(0.6, 0.5),
        lambda: ComplementaryMasks(0),
        lambda: BlockMasks(0),
        lambda: BlockMasks(1, 0),
    ],
)
def test_impossible_numbers_are_refused(make):
    with pytest.raises(ConfigError, match="algo.options"):
        make()


def sure_of(confidence, forced=None) -> Trajectory:
    """Committed left to right, one token a step."""
    trajectory = trajectory_of(list(range(1, len(confidence) + 1)))
    forced = np.zeros(len(confidence), bool) if forced is None else np.array(forced, bool)
    return with_events(trajectory, confidence=np.array(confidence, np.float32), forced=forced)


def test_the_least_sure_tokens_are_scored():
    trajectory = sure_of([0.9, 0.2, 0.5, 0.3, 0.8, 0.7])
    rows = select_scored(plan_replay(trajectory), trajectory, 0.5, "confidence")
    assert sorted(np.argwhere(rows.scored)[:, 1].tolist()) == [1, 2, 3] and len(rows) == 3
    full = plan_replay(trajectory)
    assert (rows.masked == full.masked[[1, 2, 3]]).all() and rows.step.tolist() == [1, 2, 3], "states stay as they were"
    one = select_scored(full, trajectory, 1e-9, "confidence")
    assert np.argwhere(one.scored).tolist() == [[0, 1]], "at least one"
    every = select_scored(full, trajectory, 1.0, "confidence")
    assert (every.scored == full.scored).all()


def test_only_forced_tokens_are_scored():
    trajectory = sure_of([0.9, 0.2, 0.5], forced=[1, 0, 1])
    rows = select_scored(plan_replay(trajectory), trajectory, 1.0, "forced")
    assert np.argwhere(rows.scored).tolist() == [[0, 0], [1, 2]]
    assert len(select_scored(plan_replay(trajectory), sure_of([0.9, 0.2, 0.5]), 1.0, "forced")) == 0


def test_selection_and_random_share_work_for_any_method():
    trajectories = [sure_of([0.9, 0.2, 0.5, 0.3]), sure_of([0.1, 0.2, 0.9, 0.8], forced=[1, 0, 0, 0])]
    for name in ("tracerl", "coupled_grpo", "espo", "spg", "agrpo"):
        objective = build_objective(AlgoConfig(**algo_settings(name) | {"score_share": 0.5}))
        for rows, allowed in zip(objective.plan_all(trajectories, np.random.default_rng(0)), ({1, 3}, {0, 1}), strict=True):
            assert set(np.argwhere(rows.scored)[:, 1].tolist()) <= allowed
    objective = build_objective(AlgoConfig(random_share=0.5))
    assert not objective.replays_rollout and build_objective(AlgoConfig(score_share=0.5)).replays_rollout
    rows = objective.plan_all([sure_of([0.5] * 4)] * 400, np.random.default_rng(0))
    assert np.mean([len(part) == 1 for part in rows]) == pytest.approx(0.5, abs=0.08)
    assert {part.step[0] for part in rows} == {-1, 0}


def test_the_default_draws_exactly_what_the_planner_draws():
    """Nothing is taken from the generator for knobs that are off: earlier runs repeat bit by bit."""
    trajectories = [trajectory_of(STEPS), trajectory_of([1, 1, 2, 3])]
    objective = build_objective(AlgoConfig(**algo_settings("agrpo")))
    one, other = np.random.default_rng(4), np.random.default_rng(4)
    together = objective.plan_all(trajectories, one)
    apart = [objective.planner.plan(trajectory, other) for trajectory in trajectories]
    assert all(np.array_equal(a.scored, b.scored) for a, b in zip(together, apart, strict=True))
    assert one.bit_generator.state == other.bit_generator.state
    assert build_objective(AlgoConfig()).planner == Replay()
