"""Row planners against the published vectors, an independent loop, and the states that the sampler saw."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from rlpipe.errors import ConfigError, NoStepMap
from rlpipe.objectives.planner import RandomMask, Replay, collapse_steps, plan_replay, random_rows, response_blocks
from rlpipe.objectives.rows import Rows
from rlpipe.trajectory import COMMIT, REMASK, EventLog, Trajectory

MASK = 99


def events_of(steps: np.ndarray, tokens: np.ndarray) -> EventLog:
    """Commits of 1-based `steps` (0: never), in order of time."""
    position = np.flatnonzero(steps)
    position = position[np.argsort(steps[position], kind="stable")]
    count = len(position)
    return EventLog(
        step=(steps[position] - 1).astype(np.int32),
        position=position.astype(np.int32),
        token=tokens[position].astype(np.int32),
        kind=np.full(count, COMMIT, np.int8),
        logp=np.zeros(count, np.float32),
        logp_t1=np.zeros(count, np.float32),
        confidence=np.ones(count, np.float32),
        forced=np.zeros(count, bool),
    )


def trajectory_of(steps, tokens=None, *, valid_len=None, block_size=0, prompt_len=0) -> Trajectory:
    """A response with the given 1-based steps; positions with step 0 were never committed."""
    steps = np.array(steps, np.int32)
    tokens = np.arange(1, len(steps) + 1) if tokens is None else np.array(tokens)
    return Trajectory(
        uid="test/0",
        sample=0,
        seed=0,
        prompt_ids=np.arange(50, 50 + prompt_len, dtype=np.int32),
        response_ids=np.where(steps > 0, tokens, MASK).astype(np.int32),
        valid_len=len(steps) if valid_len is None else valid_len,
        block_size=block_size,
        versions=np.zeros(1, np.int32),
        stop="length",
        events=events_of(steps, tokens),
        decoder={},
    )


def shown(trajectory: Trajectory, rows: Rows) -> list[list[int]]:
    return np.where(rows.masked, MASK, trajectory.response_ids).tolist()


def random_trajectory(rng: np.random.Generator) -> Trajectory:
    """Any grid offset, several commits a step, uncommitted positions, a tail that does not count."""
    block_size = int(rng.choice([0, 1, 2, 3, 4, 8]))
    prompt_len = int(rng.integers(0, 9))
    length = int(rng.integers(1, 25))
    if block_size:
        length += -(prompt_len + length) % block_size
    steps = rng.integers(0 if rng.random() < 0.5 else 1, 12, length)
    return trajectory_of(steps, valid_len=int(rng.integers(0, length + 1)), block_size=block_size, prompt_len=prompt_len)


def loop_rows(trajectory: Trajectory, shrink: int) -> tuple[list[list[bool]], list[list[bool]]]:
    """(masked, scored) rows by replaying block after block, token by token."""
    steps, counts = trajectory.step_map().tolist(), trajectory.loss_mask().tolist()
    size = trajectory.block_size or 10**6
    blocks: dict[int, list[int]] = {}
    for j in range(len(steps)):
        blocks.setdefault((trajectory.prompt_len + j) // size if trajectory.block_size else 0, []).append(j)
    remaining = {b: sorted({steps[j] for j in members if steps[j]}) for b, members in blocks.items()}
    masked_rows, scored_rows = [], []
    while any(remaining.values()):
        masked, scored = [False] * len(steps), [False] * len(steps)
        for b, members in blocks.items():
            now, later = remaining[b][:shrink], remaining[b][shrink:]
            for j in members:
                masked[j] = steps[j] == 0 or steps[j] in now or steps[j] in later
                scored[j] = steps[j] in now and counts[j]
            remaining[b] = later
        if any(scored):
            masked_rows.append(masked)
            scored_rows.append(scored)
    return masked_rows, scored_rows


@pytest.mark.parametrize(
    ("steps", "shrink", "expected"),
    [
        ([1, 3, 2, 4, 6, 5], 2, [2, 4, 2, 4, 6, 6]),
        ([1, 3, 2, 4, 6, 5], 3, [3, 3, 3, 6, 6, 6]),
        ([5, 5, 7, 9, 9, 12, 2], 2, [5, 5, 9, 9, 9, 12, 5]),
        ([0, 1, 2, 3, 4, 5, 6], 3, [2, 2, 2, 5, 5, 5, 6]),
        ([3, 1, 1, 7, 5, 9, 3], 2, [3, 3, 3, 7, 7, 9, 3]),
        ([0, 1, 2, 3, 4], 8, [4] * 5),
        ([], 2, []),
    ],
)
def test_collapse_steps_reference_vectors(steps, shrink, expected):
    assert collapse_steps(np.array(steps, np.int32), shrink).tolist() == expected


def test_collapse_steps_by_block_never_joins_blocks():
    steps, blocks = np.array([1, 2, 3, 4, 5, 6]), np.array([0, 0, 0, 1, 1, 1])
    assert collapse_steps(steps, 2, blocks).tolist() == [2, 2, 3, 5, 5, 6]


@pytest.mark.parametrize("shrink", [0, -1])
def test_shrink_below_one_is_refused(shrink):
    with pytest.raises(ConfigError, match="shrink"):
        collapse_steps(np.array([1, 2]), shrink)
    with pytest.raises(ConfigError, match="shrink"):
        plan_replay(trajectory_of([1, 2]), shrink)


def test_block_rows_reference_rounds():
    """Published rounds of one response; the prompt fills one block, so both grids coincide."""
    trajectory = trajectory_of([1, 3, 2, 4, 6, 5], range(21, 27), block_size=3, prompt_len=3)
    rows = plan_replay(trajectory)
    assert shown(trajectory, rows) == [[MASK] * 6, [21, MASK, MASK, 24, MASK, MASK], [21, MASK, 23, 24, MASK, 26]]
    assert rows.scored.astype(int).tolist() == [[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0]]
    assert rows.step.tolist() == [0, 1, 2]
    assert rows.masked.dtype == rows.scored.dtype == np.bool_ and rows.step.dtype == np.int32


def test_block_rows_reference_collection():
    """Two responses with padding, as published with no padding trained, and with the first padding token trained."""
    first = {"steps": [1, 2, 3, 3, 4, 5], "tokens": [21, 22, 23, 24, 25, 0], "block_size": 2, "prompt_len": 2}
    second = {"steps": [2, 1, 3, 4, 4, 4], "tokens": [31, 32, 33, 0, 0, 0], "block_size": 2, "prompt_len": 4}
    trajectory = trajectory_of(**first, valid_len=5)
    rows = plan_replay(trajectory)
    assert shown(trajectory, rows) == [[MASK] * 6, [21, MASK, 23, 24, 25, MASK]]
    assert rows.scored.astype(int).tolist() == [[1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert plan_replay(trajectory_of(**first, valid_len=6)).scored.astype(int).tolist() == [
        [1, 0, 1, 1, 1, 0],
        [0, 1, 0, 0, 0, 1],
    ]
    trajectory = trajectory_of(**second, valid_len=3)
    rows = plan_replay(trajectory)
    assert shown(trajectory, rows) == [[MASK] * 6, [MASK, 32, 33, MASK, 0, 0]]
    assert rows.scored.astype(int).tolist() == [[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    # the published code counts padding per row and would train position 4 in the first row as well; ours counts once
    assert plan_replay(trajectory_of(**second, valid_len=4)).scored.astype(int).tolist() == [
        [0, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
    ]


def test_full_attention_rows_reference():
    first = {"steps": [1, 3, 2, 4, 5, 6], "tokens": [21, 22, 23, 24, 2, 0], "prompt_len": 3}
    second = {"steps": [2, 1, 3, 4, 4, 4], "tokens": [31, 32, 2, 0, 0, 0], "prompt_len": 3}
    trajectory = trajectory_of(**first, valid_len=5)
    rows = plan_replay(trajectory, 2)
    assert shown(trajectory, rows) == [
        [MASK] * 6,
        [21, MASK, 23, MASK, MASK, MASK],
        [21, 22, 23, 24, MASK, MASK],
    ]
    assert rows.scored.astype(int).tolist() == [[1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert rows.step.tolist() == [0, 2, 4]
    trajectory = trajectory_of(**second, valid_len=3)
    rows = plan_replay(trajectory, 2)
    assert shown(trajectory, rows) == [[MASK] * 6, [31, 32, MASK, MASK, MASK, MASK]]
    assert rows.scored.astype(int).tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert len(plan_replay(trajectory_of(**first, valid_len=6))) == 6
    assert len(plan_replay(trajectory_of(**second, valid_len=4))) == 4


def test_published_block_rounds_fixture():
    """Three blocks of four: blocks that have run out stay clean while the others go on."""
    steps = [1, 1, 2, 2, 1, 2, 3, 3, 1, 1, 1, 1]
    rows = plan_replay(trajectory_of(steps, block_size=4, prompt_len=4))
    assert [np.flatnonzero(row).tolist() for row in rows.scored] == [[0, 1, 4, 8, 9, 10, 11], [2, 3, 5], [6, 7]]
    assert [np.flatnonzero(row).tolist() for row in rows.masked] == [list(range(12)), [2, 3, 5, 6, 7], [6, 7]]


def test_the_grid_is_absolute():
    """Prompt of 5 in blocks of 4: the first response block has three tokens."""
    trajectory = trajectory_of([1, 2, 3, 4, 5, 6, 7], block_size=4, prompt_len=5)
    assert response_blocks(trajectory).tolist() == [1, 1, 1, 2, 2, 2, 2]
    rows = plan_replay(trajectory)
    assert [np.flatnonzero(row).tolist() for row in rows.scored] == [[0, 3], [1, 4], [2, 5], [6]]
    assert rows.step.tolist() == [0, 1, 2, 6]


def test_tail_of_the_terminal_block_is_shown_but_never_scored():
    trajectory = trajectory_of([3, 1, 2, 4], valid_len=1, block_size=4, prompt_len=4)
    rows = plan_replay(trajectory)
    assert shown(trajectory, rows) == [[MASK, 2, 3, MASK]]
    assert rows.scored.tolist() == [[True, False, False, False]]
    assert rows.step.tolist() == [2]


def test_closed_form_equals_loop():
    rng = np.random.default_rng(0)
    for _ in range(300):
        trajectory, shrink = random_trajectory(rng), int(rng.integers(1, 5))
        masked, scored = loop_rows(trajectory, shrink)
        rows = plan_replay(trajectory, shrink)
        assert rows.masked.tolist() == masked and rows.scored.tolist() == scored
        assert rows.partitions(trajectory.loss_mask())
        assert rows.masked[:, trajectory.step_map() == 0].all()
        if trajectory.block_size:
            assert len(rows) <= -(-trajectory.block_size // shrink)


def test_rows_are_the_states_the_sampler_saw():
    """Full attention: the row is the whole canvas before its step. Blocks: a scored token's own block is, and
    all earlier blocks are finished, which is all that a block model sees."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        full = trajectory_of(rng.integers(0, 8, 12), valid_len=10)
        rows = plan_replay(full)
        for row, step in zip(shown(full, rows), rows.step, strict=True):
            assert row == full.state(step, MASK).tolist()
        size, prompt_len, start, steps = 4, int(rng.integers(0, 6)), 0, []
        for width in [size - prompt_len % size, size, size]:
            steps += (start + rng.permutation(width) + 1).tolist()  # one token a step, block after block
            start += width
        trajectory = trajectory_of(steps, block_size=size, prompt_len=prompt_len)
        rows, blocks = plan_replay(trajectory), response_blocks(trajectory)
        noisy = np.array(shown(trajectory, rows))
        for row, position in np.argwhere(rows.scored):
            state = trajectory.state(steps[position] - 1, MASK)
            own, earlier = blocks == blocks[position], blocks < blocks[position]
            assert noisy[row][own].tolist() == state[own].tolist()
            assert state[earlier].tolist() == trajectory.response_ids[earlier].tolist()


def test_scored_log_probabilities_are_the_chain_rule():
    """One token a step, 3 tokens, 4 words: the probabilities of all 64 responses, so scored, add up to 1."""
    rng = np.random.default_rng(2)
    table: dict[tuple[int, ...], np.ndarray] = {}
    for steps in itertools.permutations([1, 2, 3]):
        total = 0.0
        for tokens in itertools.product(range(4), repeat=3):
            trajectory = trajectory_of(steps, tokens)
            rows, logp = plan_replay(trajectory), 0.0
            for state, scored in zip(shown(trajectory, rows), rows.scored, strict=True):
                probabilities = table.setdefault(tuple(state), rng.dirichlet(np.ones(4), 3))
                logp += np.log(probabilities[scored, np.array(tokens)[scored]]).sum()
            total += np.exp(logp)
        assert total == pytest.approx(1.0, abs=1e-12)


def test_all_steps_merged_is_one_fully_masked_row():
    rows = plan_replay(trajectory_of([3, 1, 2, 4], valid_len=3), shrink=100)
    assert rows.masked.tolist() == [[True] * 4] and rows.scored.tolist() == [[True, True, True, False]]


def test_nothing_to_score_gives_no_rows():
    rows = plan_replay(trajectory_of([0, 0, 1], valid_len=2))
    assert len(rows) == 0 and rows.num_scored == 0 and rows.masked.shape == (0, 3)
    assert len(random_rows(trajectory_of([0, 0, 1], valid_len=2), np.random.default_rng(0))) == 0


def remasked() -> Trajectory:
    plain = trajectory_of([1, 2, 3])
    log = {name: getattr(plain.events, name) for name in EventLog.DTYPES}
    log = {name: np.append(column, column[-1:]) for name, column in log.items()}
    log["position"] = np.array([0, 1, 0, 2], np.int32)
    log["kind"] = np.array([COMMIT, COMMIT, REMASK, COMMIT], np.int8)
    log["step"] = np.arange(4, dtype=np.int32)
    fields = {name: getattr(plain, name) for name in Trajectory.__slots__ if name != "events"}
    return Trajectory(**fields, events=EventLog(**log))


def test_remasked_trajectories_have_no_replay_rows_but_random_ones():
    with pytest.raises(NoStepMap):
        plan_replay(remasked())
    rows = random_rows(remasked(), np.random.default_rng(0), draws=50)
    assert not rows.scored[:, 0].any() and rows.masked[:, 0].all()


@pytest.mark.parametrize("block_size", [0, 4])
def test_random_rows(block_size):
    trajectory = trajectory_of([1] * 15 + [0], valid_len=12, block_size=block_size)
    rows = random_rows(trajectory, np.random.default_rng(3), draws=4000)
    assert rows.scored.shape == (4000, 16) and (rows.step == -1).all()
    assert (rows.scored[:, :12] == rows.masked[:, :12]).all() and rows.scored.any(1).all()
    assert rows.masked[:, 12:].all() and not rows.scored[:, 12:].any()
    assert rows.scored[:, :12].mean() == pytest.approx(0.5, abs=0.02)
    spread = rows.scored[:, :12].sum(1).var()  # binomial (3) with a level a token, far wider with a level a row
    assert (spread < 4) == bool(block_size)
    again = random_rows(trajectory, np.random.default_rng(3), draws=4000)
    assert (again.masked == rows.masked).all()


def test_a_draw_always_scores_something():
    trajectory = trajectory_of([1, 2, 3], valid_len=2)
    rows = random_rows(trajectory, np.random.default_rng(0), draws=200, low=0.0, high=1e-9)
    assert (rows.scored.sum(1) == 1).all() and set(np.argwhere(rows.scored)[:, 1]) == {0, 1}


@pytest.mark.parametrize("planner", [Replay(), Replay(3), RandomMask(draws=2)])
def test_planning_leaves_global_generators_untouched(planner):
    def states():
        return random.getstate(), [np.asarray(part).tolist() for part in np.random.get_state()], torch.get_rng_state()

    before = states()
    first = planner.plan(trajectory_of([3, 1, 2, 4]), np.random.default_rng(5))
    second = planner.plan(trajectory_of([3, 1, 2, 4]), np.random.default_rng(5))
    after = states()
    assert before[0] == after[0] and before[1] == after[1] and torch.equal(before[2], after[2])
    assert (first.masked == second.masked).all()


def test_only_unmerged_replay_shows_the_sampler_states():
    assert [p.replays_rollout for p in (Replay(), Replay(2), RandomMask())] == [True, False, False]


def test_rows_refuse_to_score_what_they_show():
    step = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="position 1"):
        Rows(masked=np.array([[True, False]]), scored=np.array([[True, True]]), step=step)
    with pytest.raises(ValueError, match="disagree"):
        Rows(masked=np.ones((2, 2), bool), scored=np.ones((1, 2), bool), step=step)
    with pytest.raises(ValueError, match="bool"):
        Rows(masked=np.ones((1, 2), np.int32), scored=np.ones((1, 2), bool), step=step)
    with pytest.raises(ValueError, match="targets"):
        Rows(masked=np.ones((1, 2), bool), scored=np.ones((1, 2), bool), step=step, targets=np.ones((1, 3), np.int32))


def test_rows_concat():
    trajectory = trajectory_of([3, 1, 2, 4])
    rows = plan_replay(trajectory)
    both = Rows.concat([rows, rows])
    assert len(both) == 8 and both.num_scored == 8 and not both.partitions(trajectory.loss_mask())
    with_targets = Rows(masked=rows.masked, scored=rows.scored, step=rows.step, targets=np.zeros(rows.scored.shape, np.int32))
    assert Rows.concat([with_targets, with_targets]).targets.shape == (8, 4)
    with pytest.raises(ValueError, match="targets"):
        Rows.concat([rows, with_targets])
