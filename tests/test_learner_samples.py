"""Samples as columns, token counts, micro-batch plans, dealing to updates."""

import numpy as np
import pytest
import torch
from tiny_models import prompts, sample, tiny

from rlpipe.config import AlgoConfig
from rlpipe.learner.batches import Batches
from rlpipe.learner.micro_batches import Sizes, make_shards, plan_micro_batches
from rlpipe.learner.samples import Sample, Samples
from rlpipe.learner.step import deal, draws_and_passes, make_samples, plan_step
from rlpipe.objectives.objective import build_objective
from rlpipe.objectives.rows import Rows
from rlpipe.objectives.units import join
from rlpipe.trajectory import replace


def groups_of(kind: str, count: int = 12, group: int = 3, **decoder):
    """`count` trajectories, `group` to a prompt."""
    model, tokenizer = tiny(kind)
    tokens = [ids for ids in prompts(tokenizer, -(-count // group)) for _ in range(group)][:count]
    records, _ = sample(model, tokens, max_tokens=10, **decoder)
    return model, [replace(record, uid=f"p{i // group}", sample=i % group) for i, record in enumerate(records)]


def step_plan(kind: str, count: int = 12, shrink: int = 1, updates: int = 2, group: int = 3, draws: int = 1, **algo):
    _, records = groups_of(kind, count, group)
    advantages = np.random.default_rng(1).normal(size=count).astype(np.float32)
    objective = build_objective(AlgoConfig(shrink=shrink, **algo), 10)
    rng = np.random.default_rng(0)
    return plan_step(records, advantages, objective, updates=updates, gauge_trajectories=4, rng=rng, draws=draws), records


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("ratio", ("token", "sequence"))
def test_columns_give_samples_back_with_their_token_counts(kind, ratio):
    plan, _ = step_plan(kind, ratio=ratio)
    store, spec = Samples.of(plan.samples), tiny(kind)[0].spec
    batches = Batches(store, spec, torch.device("cpu"))
    sizes = Sizes.of(plan.samples)
    for index, (want, got) in enumerate(zip(plan.samples, store, strict=True)):
        for name in Sample.__slots__:
            np.testing.assert_array_equal(getattr(want, name), getattr(got, name))
        assert len(batches.pieces[index]) == got.own_tokens()
        assert len(batches.pieces[index].prefix_ids) == got.shared_tokens()
        assert got.num_scored == got.scored.sum()
    everything = list(range(len(plan.samples)))
    packed = batches.packed(everything)
    assert packed.input_ids.shape[1] == sizes.tokens(everything)
    assert sorted(packed.slot.tolist()) == list(range(sum(s.num_scored for s in plan.samples)))
    if ratio == "sequence":
        assert all(len(s.advantage) == 1 for s in plan.samples)


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("shrink", (1, 2))
def test_a_step_scores_every_valid_token_once_and_its_weights_sum_to_the_updates(kind, shrink):
    plan, records = step_plan(kind, shrink=shrink)
    trained = [i for update in plan.updates for i in update]
    assert len(set(trained)) == len(trained)
    assert sum(plan.samples[i].num_scored for i in trained) == sum(r.valid_len for r in records)
    for update in plan.updates:  # token_mean: each update is a mean over its tokens
        assert sum(plan.samples[i].policy_weight.sum() for i in update) == pytest.approx(1.0, abs=1e-5)
    gauged = trained if shrink == 1 else plan.gauge
    assert all(np.isfinite(plan.samples[i].rollout_logp).all() for i in gauged) and gauged
    assert all((plan.samples[i].prompt_ids == records[plan.owner[i]].prompt_ids).all() for i in trained)
    if shrink > 1:
        assert not set(plan.gauge) & set(trained)
        assert all(np.isnan(plan.samples[i].rollout_logp).all() for i in trained)


def test_groups_are_dealt_whole_and_split_only_where_there_are_too_few():
    group = np.repeat([0, 1, 2, 3], 3)
    parts = deal(group, 2, np.random.default_rng(0))
    assert sorted(np.concatenate(parts)) == list(range(12))
    assert all(len(set(group[part])) == 2 and len(part) == 6 for part in parts)
    few = deal(group[:6], 5, np.random.default_rng(0))
    assert len(few) == 5 and sorted(np.concatenate(few)) == list(range(6))


def test_more_updates_than_trajectories_makes_fewer_updates():
    plan, _ = step_plan("block", count=3, updates=5)
    assert len(plan.updates) == 3 and all(plan.updates)


def sizes_of(rng, count: int, groups: int) -> Sizes:
    group = np.sort(rng.integers(0, groups, count))
    return Sizes(rng.integers(3, 40, count), rng.integers(0, 20, groups)[group], group)


@pytest.mark.parametrize("ranks", (1, 2, 3))
@pytest.mark.parametrize("budget", (1, 50, 10**6))
def test_micro_batches_keep_the_budget_and_give_all_ranks_equally_many(ranks, budget):
    sizes = sizes_of(np.random.default_rng(0), 25, 5)
    plan = plan_micro_batches(sizes, range(25), budget, ranks)
    live = [i for rank in plan for batch in rank for i in batch if i >= 0]
    assert sorted(live) == list(range(25))
    assert len({len(rank) for rank in plan}) == 1
    for rank in plan:
        for batch in rank:
            assert len(batch) == 1 or sizes.tokens(batch) <= budget
            assert all(i >= 0 for i in batch) or (len(batch) == 1 and batch[0] < 0)
    assert plan == plan_micro_batches(sizes, range(25), budget, ranks)
    assert any(i >= 0 for i in plan[-1][0]), "no rank is idle while there is enough to share"


def test_a_group_shares_a_micro_batch_where_it_fits():
    sizes = Sizes(np.full(8, 10), np.full(8, 100), np.repeat([0, 1], 4))
    (batches,) = plan_micro_batches(sizes, range(8), 150, 1)
    assert sorted(map(sorted, batches)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sizes.tokens([0, 1, 4]) == 230


def test_a_lone_sample_is_filled_up_with_nothing():
    assert plan_micro_batches(Sizes(np.array([7]), np.array([0]), np.array([0])), [0], 100, 2) == [[[0]], [[~0]]]


@pytest.mark.parametrize("ranks", (1, 2))
def test_shards_refer_to_their_own_samples(ranks):
    plan, _ = step_plan("block", shrink=2)
    shards = make_shards(plan.samples, plan.updates, plan.gauge, 64, ranks)
    seen = 0
    for number in range(len(plan.updates)):
        assert len({len(shard.updates[number]) for shard in shards}) == 1
        for shard in shards:
            for batch in shard.updates[number]:
                seen += sum(shard.samples[i].num_scored for i in batch if i >= 0)
    assert seen == sum(plan.samples[i].num_scored for update in plan.updates for i in update)
    assert len({len(shard.gauge) for shard in shards}) == 1
    for shard in shards:
        for place, held in zip(shard.places, shard.samples, strict=True):
            np.testing.assert_array_equal(held.scored, plan.samples[place].scored)


def test_a_response_with_nothing_to_score_makes_no_sample():
    _, records = groups_of("block", 2)
    length = records[0].response_len
    none = Rows(masked=np.zeros((0, length), bool), scored=np.zeros((0, length), bool), step=np.zeros(0, np.int32))
    empty = np.zeros(0, np.float32)
    units = join(none, "token", np.zeros(length, np.int64))
    assert make_samples(records[0], none, units, empty, empty, 1.0, 0, replays=True) == []


def test_rows_drawn_anew_are_updates_of_their_own():
    plan, records = step_plan("full", preset="coupled_grpo", ratio="position", draws=2)
    assert len(plan.updates) == 4 and draws_and_passes(AlgoConfig(epochs=2, redraw=True)) == (2, 1)
    assert draws_and_passes(AlgoConfig(epochs=2)) == (1, 2)
    masks = [set(), set()]
    for draw, updates in enumerate((plan.updates[:2], plan.updates[2:])):
        owners = [{plan.owner[i] for i in update} for update in updates]
        assert owners[0].isdisjoint(owners[1]) and owners[0] | owners[1] == set(range(len(records)))
        masks[draw] = {plan.samples[i].masked.tobytes() for update in updates for i in update}
        for update in updates:
            assert sum(plan.samples[i].policy_weight.sum() for i in update) == pytest.approx(1.0, abs=1e-5)
    assert masks[0] != masks[1]
    once = step_plan("full", preset="coupled_grpo", ratio="position")[0]
    assert [[s.masked.tobytes() for s in (plan.samples[i] for i in u)] for u in plan.updates[:2]] == [
        [s.masked.tobytes() for s in (once.samples[i] for i in u)] for u in once.updates
    ]
