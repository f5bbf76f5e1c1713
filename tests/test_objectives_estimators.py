"""Planners that score a part of a rollout or states it never saw: vectors, equalities, brute force on a toy."""

import itertools

import numpy as np
import pytest
import torch
from test_objectives import predicted, trajectory_of

from rlpipe import recipe
from rlpipe.config import AlgoConfig
from rlpipe.errors import ConfigError
from rlpipe.objective_presets import ALGO_PRESETS, algo_settings
from rlpipe.objectives.estimators import AllMasked, LeftToRight, SampledSteps, Segments, draw_steps
from rlpipe.objectives.objective import PRESETS, build_objective
from rlpipe.objectives.planner import Replay, plan_replay
from rlpipe.trajectory import PRESET, EventLog, replace

RNG = np.random.default_rng(0)


def named(name: str, **changes) -> AlgoConfig:
    return AlgoConfig(**algo_settings(name) | changes)


def same(one, other) -> bool:
    return np.array_equal(one.masked, other.masked) and np.array_equal(one.scored, other.scored)


def weights_of(objective, rows, trajectories) -> list:
    """Policy weights of the units of each response."""
    units = [objective.units(part, trajectory) for part, trajectory in zip(rows, trajectories, strict=True)]
    return objective.weights(units, [trajectory.response_len for trajectory in trajectories])[0]


def test_agrpo_draws_its_published_steps():
    """Vector 9.3: entropies .3, 1.2 (summed by step), uniforms .1 .5 .9."""
    chosen, weight = draw_steps(np.array([0.3, 1.2, 0.0]), np.array([0.1, 0.5, 0.9]))
    probability = np.array([0.3, 1.2]) / 1.5
    assert probability.tolist() == pytest.approx([0.2, 0.8]) and chosen.tolist() == [0, 1, 1]
    assert weight.tolist() == pytest.approx([1.666667, 0.416667, 0.416667], abs=1e-6)


@pytest.mark.parametrize("block_size", (0, 4))
def test_agrpo_over_all_steps_is_cj(block_size):
    """As many stratified draws as there are steps, one token each: every step once, the same weights as the trajectory mean."""
    trajectories = [trajectory_of([2, 1, 4, 3, 8, 6, 5, 7], block_size), trajectory_of([1, 2, 3, 4, 5, 6, 7, 8], block_size)]
    agrpo, cj = build_objective(named("agrpo", options={"count": 8})), build_objective(named("cj_grpo"))
    for trajectory in trajectories:
        rows = agrpo.plan(trajectory, np.random.default_rng(3))
        assert rows.partitions(trajectory.loss_mask()) and np.allclose(rows.weight, 1 / 8)
    ours = weights_of(agrpo, [agrpo.plan(t, np.random.default_rng(3)) for t in trajectories], trajectories)
    theirs = weights_of(cj, [cj.plan(t, RNG) for t in trajectories], trajectories)
    if not block_size:
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
    assert sum(w.sum() for w in ours) == pytest.approx(1.0) == sum(w.sum() for w in theirs)


def test_agrpo_is_unbiased():
    trajectory = trajectory_of([1, 1, 2, 3, 4, 5, 5, 6])
    total = np.zeros(8)
    for seed in range(3000):
        rows = SampledSteps(2).plan(trajectory, np.random.default_rng(seed))
        total += (rows.scored * rows.weight[:, None]).sum(0)
    np.testing.assert_allclose(total / 3000, 1 / 6, atol=0.01)


@pytest.mark.parametrize("block_size", (0, 4))
def test_all_steps_merged_is_one_segment_is_all_masked(block_size):
    trajectory = trajectory_of([2, 1, 4, 3, 8, 6, 5, 7], block_size)
    one = Segments(1).plan(trajectory, RNG)
    assert same(one, AllMasked().plan(trajectory, RNG)) and same(one, plan_replay(trajectory, shrink=100))
    assert len(one) == 1 and one.masked.all() and one.scored.all()


def test_segments_are_even_and_as_many_as_steps_is_replay():
    trajectory = trajectory_of([2, 1, 4, 3, 8, 6, 5, 7])
    rows = Segments(4).plan(trajectory, RNG)
    assert rows.scored.sum(1).tolist() == [2, 2, 2, 2] and rows.step.tolist() == [0, 2, 4, 6]
    assert same(Segments(8).plan(trajectory, RNG), plan_replay(trajectory))
    assert same(Segments(50).plan(trajectory, RNG), plan_replay(trajectory)), "never more segments than steps"
    assert rows.partitions(trajectory.loss_mask())


@pytest.mark.parametrize("block_size", (0, 4))
def test_left_to_right_is_replay_of_a_left_to_right_rollout(block_size):
    straight = trajectory_of(list(range(1, 9)), block_size)
    shuffled = trajectory_of([2, 1, 4, 3, 8, 6, 5, 7], block_size)
    assert same(LeftToRight().plan(shuffled, RNG), plan_replay(straight))
    part = LeftToRight(0.5).plan(shuffled, np.random.default_rng(1))
    assert len(part) == (2 if block_size else 4) and np.allclose(part.weight, 2.0)
    assert (part.scored & ~part.masked).sum() == 0


def test_left_to_right_of_an_answer_at_the_end_of_its_block():
    """Two tokens behind a prompt of six in blocks of eight: the second was never committed and stays hidden throughout."""
    trajectory = replace(trajectory_of([2, 1]), prompt_ids=np.zeros(6, np.int32), block_size=8)
    rows = LeftToRight().plan(trajectory, RNG)
    assert rows.scored.tolist() == [[True, False], [False, True]] and rows.masked.tolist() == [[True, True], [False, True]]
    log = {name: getattr(trajectory.events, name)[trajectory.events.position == 0] for name in EventLog.DTYPES}
    rows = LeftToRight().plan(replace(trajectory, events=EventLog(**log)), RNG)
    assert rows.masked.tolist() == [[True, True]] and rows.scored.tolist() == [[True, False]]


def test_the_rows_of_one_token_steps_are_the_chain_rule():
    """Three tokens of a vocabulary of four under a made-up conditional law: for every order, the rows' log-probabilities sum to
    the chain rule's, and over all 64 responses the products sum to 1."""
    rng = np.random.default_rng(5)
    table = {}

    def law(context: tuple, position: int) -> np.ndarray:
        """p(token at position | visible tokens), for any set of visible ones."""
        key = (context, position)
        if key not in table:
            table[key] = rng.dirichlet(np.ones(4))
        return table[key]

    for order in itertools.permutations(range(3)):
        steps = np.empty(3, int)
        steps[list(order)] = [1, 2, 3]
        total = 0.0
        for tokens in itertools.product(range(4), repeat=3):
            trajectory = trajectory_of(steps.tolist())
            rows = plan_replay(trajectory)
            logp = 0.0
            for row in range(len(rows)):
                context = tuple(-1 if rows.masked[row, i] else tokens[i] for i in range(3))
                logp += sum(np.log(law(context, i)[tokens[i]]) for i in np.flatnonzero(rows.scored[row]))
            chain, seen = 0.0, [-1, -1, -1]
            for position in order:
                chain += np.log(law(tuple(seen), position)[tokens[position]])
                seen[position] = tokens[position]
            assert logp == pytest.approx(chain, abs=1e-12)
            total += np.exp(logp)
        assert total == pytest.approx(1.0)


def test_cj_scores_the_tail_and_never_what_was_fixed_beforehand():
    trajectory = replace(trajectory_of([1, 2, 3, 4, 5, 6]), valid_len=4)
    assert Replay(tail=True).plan(trajectory, RNG).scored.sum() == 6 and Replay().plan(trajectory, RNG).scored.sum() == 4
    log = trajectory.events
    kind, step = log.kind.copy(), log.step.copy()
    kind[0], step[0] = PRESET, -1
    fields = {name: getattr(log, name) for name in EventLog.DTYPES}
    fixed = replace(trajectory, events=EventLog(**fields | {"kind": kind, "step": step}))
    for planner in (Replay(tail=True), Segments(3), SampledSteps(4), LeftToRight(), AllMasked()):
        rows = planner.plan(fixed, np.random.default_rng(0))
        assert not rows.scored[:, 0].any() and not rows.masked[:, 0].any()


def test_static_schedules_make_cj_and_tracerl_equal():
    """Equality 1: equal counts a step, no KL: the mean over rows is the mean over steps, then over responses."""
    trajectories = [trajectory_of([2, 1, 2, 1, 3, 3]), trajectory_of([1, 1, 2, 2, 3, 3])]
    cj = build_objective(named("cj_grpo", options={}))
    tracerl = build_objective(AlgoConfig(normalizer="row_mean"))
    one = weights_of(cj, cj.plan_all(trajectories, RNG), trajectories)
    other = weights_of(tracerl, tracerl.plan_all(trajectories, RNG), trajectories)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("name", ALGO_PRESETS)
def test_every_preset_is_known_everywhere_and_draws_from_its_own_generator(name):
    assert set(ALGO_PRESETS) == set(PRESETS)
    objective = build_objective(named(name), max_tokens=8)
    trajectories = predicted([[2, 1, 4, 3], [1, 2, 4, 3]])
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, second = (objective.plan_all(trajectories, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(np.random.get_state()[1], before[0]) and torch.equal(torch.get_rng_state(), before[1])
    assert all(same(one, other) and len(one) for one, other in zip(first, second, strict=True))
    units = [objective.units(rows, trajectory) for rows, trajectory in zip(first, trajectories, strict=True)]
    for weights in objective.weights(units, [4, 4]):
        assert [len(w) for w in weights] == [len(u) for u in units] and all(np.isfinite(w).all() for w in weights)
    replayed = Replay().plan(trajectories[0], RNG)
    assert objective.replays_rollout <= all(row in replayed.masked.tolist() for row in first[0].masked.tolist())


def test_presets_leave_nothing_of_one_another():
    keys = {frozenset(settings) for name, settings in ALGO_PRESETS.items() if name not in ("tracerl", "random_mask")}
    smallest = min(keys, key=len)
    assert all(found - smallest <= {"kl_lag", "kl_mix"} for found in keys)
    assert set(ALGO_PRESETS["tracerl"]) | {"shrink"} == set(ALGO_PRESETS["random_mask"]) <= smallest
    cfg = recipe.load(["recipe=quickstart_full", "algo.preset=coupled_grpo", "algo.kl_coef=0"])
    assert (cfg.algo.ratio, cfg.algo.kl_reference, cfg.algo.kl_coef) == ("position", "lagged", 0.0)
    assert not build_objective(cfg.algo).needs_reference and build_objective(named("espo")).needs_reference


def test_a_preset_lies_under_the_keys_beside_it():
    cfg = recipe.load(["recipe=quickstart", "algo.preset=cj_grpo"])
    assert (cfg.algo.advantage, cfg.algo.clip_high, cfg.algo.normalizer) == ("mean", 0.5, "step_mean")
    assert cfg.algo.options == {"tail": True} and cfg.algo.prompts_per_step == 16
    assert recipe.load(["recipe=quickstart", "algo.preset=cj_grpo", "algo.clip_high=0.3"]).algo.clip_high == 0.3
    assert recipe.load(["recipe=quickstart", "algo.preset=tracerl"]).algo == recipe.load(["recipe=quickstart"]).algo
    with pytest.raises(ConfigError, match="did you mean agrpo"):
        recipe.load(["recipe=quickstart", "algo.preset=agrp"])
    with pytest.raises(ConfigError, match="did you mean count"):
        build_objective(named("agrpo", options={"cuont": 3}))
    with pytest.raises(ConfigError, match="merges no steps"):
        build_objective(named("diffu_grpo", shrink=2))
