"""Samples as columns, packed lengths, micro-batch plans."""

import numpy as np
import pytest
from tiny_models import prompts, sample, tiny

from rlpipe.config import AlgoConfig
from rlpipe.learner.samples import Sample, Samples, make_shards, plan_micro_batches
from rlpipe.learner.step import plan_step
from rlpipe.models.packing import pack_rows
from rlpipe.objectives.objective import build_objective


def step_plan(kind: str, count: int = 12, shrink: int = 1, updates: int = 2, **decoder):
    model, tokenizer = tiny(kind)
    records, _ = sample(model, prompts(tokenizer, count), max_tokens=10, **decoder)
    advantages = np.random.default_rng(1).normal(size=count).astype(np.float32)
    objective = build_objective(AlgoConfig(shrink=shrink), 10)
    rng = np.random.default_rng(0)
    return plan_step(list(records), advantages, objective, updates=updates, gauge_trajectories=4, rng=rng), records


@pytest.mark.parametrize("kind", ("block", "full"))
def test_columns_give_samples_back_with_their_packed_length(kind):
    plan, _ = step_plan(kind)
    store = Samples.of(plan.samples)
    for want, got in zip(plan.samples, store, strict=True):
        for name in Sample.__slots__:
            np.testing.assert_array_equal(getattr(want, name), getattr(got, name))
        packs = pack_rows(got.prompt_ids, got.response_ids, got.masked, got.scored, block_size=got.block_size, mask_id=2)
        assert [len(pack) for pack in packs] == [got.packed_tokens()]
        assert sorted(packs[0].slot.tolist()) == list(range(got.num_scored))


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
    if shrink > 1:
        assert not set(plan.gauge) & set(trained)
        assert all(np.isnan(plan.samples[i].rollout_logp).all() for i in trained)


def test_more_updates_than_trajectories_makes_fewer_updates():
    plan, _ = step_plan("block", count=3, updates=5)
    assert len(plan.updates) == 3 and all(plan.updates)


@pytest.mark.parametrize("ranks", (1, 2, 3))
@pytest.mark.parametrize("budget", (1, 50, 10**6))
def test_micro_batches_keep_the_budget_and_give_all_ranks_equally_many(ranks, budget):
    tokens = np.random.default_rng(0).integers(3, 40, 25).tolist()
    plan = plan_micro_batches(tokens, budget, ranks)
    live = [i for rank in plan for batch in rank for i in batch if i >= 0]
    assert sorted(live) == list(range(25))
    assert len({len(rank) for rank in plan}) == 1
    for rank in plan:
        for batch in rank:
            assert len(batch) == 1 or max(tokens[i] for i in batch) * len(batch) <= budget
            assert all(i >= 0 for i in batch) or (len(batch) == 1 and batch[0] < 0)
    assert plan == plan_micro_batches(tokens, budget, ranks)
    assert any(i >= 0 for i in plan[-1][0]), "no rank is idle while there is enough to share"


def test_a_lone_sample_is_filled_up_with_nothing():
    assert plan_micro_batches([7], 100, 2) == [[[0]], [[~0]]]


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


def test_a_response_with_nothing_to_score_makes_no_sample():
    from rlpipe.learner.step import make_samples
    from rlpipe.objectives.rows import Rows

    _, records = step_plan("block", count=2)
    none = Rows(masked=np.zeros((0, 10), bool), scored=np.zeros((0, 10), bool), step=np.zeros(0, np.int32))
    empty = np.zeros(0, np.float32)
    assert make_samples(records[0], none, empty, empty, empty, replays=True) == []
