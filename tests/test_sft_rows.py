"""Supervised rows and losses: unbiased against enumeration, equal to dense brute force, certainty by hand."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from test_learner_samples import groups_of
from test_objectives_toy import LENGTH, MASK, model, parameters
from tiny_models import prompts, tiny, with_spec

from rlpipe.config import AlgoConfig, RunConfig, SftConfig
from rlpipe.errors import ConfigError
from rlpipe.learner.batches import Batches
from rlpipe.objectives.objective import build_objective
from rlpipe.objectives.planner import Replay
from rlpipe.objectives.supervised import MaskedBlocks, Recorded, supervised_settings
from rlpipe.sft.driver import learner_config, plan_update
from rlpipe.sft.recordings import committed
from rlpipe.trajectory import replace


def objective_of(name: str, **options):
    return build_objective(AlgoConfig(**supervised_settings(name, options)))


def demonstration(prompt_len: int, length: int, block_size: int, uid: str = "d", seed: int = 0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 20, prompt_len + length).astype(np.int32)
    return committed(uid, ids[:prompt_len], ids[prompt_len:], np.arange(length, dtype=np.int32), block_size=block_size)


def bound(logp) -> float:
    """∫ over t in (0, 1) of 1/t · E over masks with chance t of Σ masked log p, in closed form: logp maps a mask to a sum."""
    masks = [np.array(mask, bool) for mask in itertools.product((False, True), repeat=LENGTH) if any(mask)]
    beta = lambda n: math.factorial(n - 1) * math.factorial(LENGTH - n) / math.factorial(LENGTH)  # noqa: E731
    return sum(beta(int(mask.sum())) * logp(mask) for mask in masks)


@pytest.mark.parametrize("draws", (1, 3))
def test_random_masks_estimate_the_integral_over_noise_levels_without_bias(draws):
    theta, answer = parameters(3), np.array([1, 3, 0])

    def logp(mask: np.ndarray) -> float:
        found = model(theta, np.where(mask, MASK, answer)[None])[0]
        return float(sum(found[i, answer[i]] for i in np.flatnonzero(mask)))

    trajectory, planner, rng = demonstration(2, LENGTH, 0), MaskedBlocks(draws=draws), np.random.default_rng(0)
    estimates = []
    for _ in range(3000):
        rows = planner.plan(trajectory, rng)
        assert rows.entry_weight().sum() == pytest.approx(LENGTH)
        per_row = rows.weight.max(1)
        estimates.append(sum(w * logp(mask) for w, mask in zip(per_row, rows.scored, strict=True)))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - bound(logp)) < 4 * error, "and the estimate is a sum over tokens"


@pytest.mark.parametrize("prompt_len, length", [(4, 8), (5, 7), (7, 9)])
def test_blocks_of_a_block_model_stand_side_by_side_in_one_row(prompt_len, length):
    rows = MaskedBlocks().plan(demonstration(prompt_len, length, 4), np.random.default_rng(0))
    assert len(rows) == 1 and (rows.masked == rows.scored).all()
    for block in np.split(np.arange(length), np.arange(-prompt_len % 4, length, 4)):
        if len(block):
            assert rows.scored[0, block].any()
            assert rows.weight[0, block].sum() == pytest.approx(len(block))


def test_semi_autoregressive_rows_of_full_attention():
    trajectory, rng = demonstration(3, 20, 0), np.random.default_rng(1)
    rows = MaskedBlocks(size=8, draws=0).plan(trajectory, rng)
    assert len(rows) == 3, "every block once"
    seen = set()
    for masked, scored, weight in zip(rows.masked, rows.scored, rows.weight, strict=True):
        block = int(np.flatnonzero(scored)[0]) // 8
        seen.add(block)
        assert (np.flatnonzero(scored) // 8 == block).all()
        assert not masked[: block * 8].any() and masked[(block + 1) * 8 :].all()
        assert weight.sum() == pytest.approx(len(range(20)[block * 8 : block * 8 + 8]))
    assert seen == {0, 1, 2}
    one = [MaskedBlocks(size=8).plan(trajectory, rng).entry_weight().sum() for _ in range(4000)]
    assert np.mean(one) == pytest.approx(20, rel=0.02), "one block drawn stands for three"


def test_a_half_and_its_complement_score_a_block_once():
    rows = MaskedBlocks(size=8, share=0.5, complement=True).plan(demonstration(3, 16, 0), np.random.default_rng(2))
    assert len(rows) == 2 and rows.scored.sum() == 8 and rows.scored.sum(1).tolist() == [4, 4]
    block = rows.scored.any(0)
    assert len(set(np.flatnonzero(block) // 8)) == 1
    behind = np.arange(16) > np.flatnonzero(block)[-1]
    assert (rows.masked == (rows.scored | behind)).all()


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("shrink", (1, 2))
def test_trace_rows_are_those_of_rl(kind, shrink):
    _, records = groups_of(kind, count=4)
    for record in records:
        mine = objective_of("trace", shrink=shrink).plan(record, np.random.default_rng(0))
        theirs = Replay(shrink=shrink).plan(record, np.random.default_rng(0))
        for name in ("masked", "scored", "step"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    assert not Recorded().replays_rollout, "another model may have recorded it: nothing to compare"


def packed_loss(lm, records, objective, rng) -> tuple[torch.Tensor, list]:
    """The update's loss through samples and packing, and its plan's samples."""
    plan = plan_update(records, objective, rng)
    batches, every = Batches(plan.samples, lm.spec, torch.device("cpu")), list(range(len(plan.samples)))
    packed = batches.packed(every)
    logp, _ = lm(packed.input_ids, packed.position_ids, packed.plan(), packed.index, packed.targets)
    logp = logp[packed.slot.argsort()]
    return objective.loss(logp, logp.detach(), batches.entries(every)).loss, plan.samples


def stock_logp(lm, prefix: np.ndarray, shown: np.ndarray, block_size: int) -> torch.Tensor:
    """[len(shown), V] at the last positions of prefix + shown, by the stock class under a dense mask made here."""
    plain = copy.deepcopy(lm.lm)
    plain.config._attn_implementation = plain.model.config._attn_implementation = "sdpa"
    ids = torch.from_numpy(np.concatenate([prefix, shown]).astype(np.int64))[None]
    place = torch.arange(ids.shape[1])
    sees = (
        place[:, None] // block_size >= place[None] // block_size if block_size else torch.ones(len(place), len(place)).bool()
    )
    logits = plain(input_ids=ids, position_ids=place[None], attention_mask=sees[None, None]).logits[0]
    logits[:, lm.forbidden] = float("-inf")
    return logits.log_softmax(-1)[len(prefix) - lm.spec.logit_shift :][: len(shown)]


@pytest.mark.parametrize(
    ("kind", "shift", "options"),
    [("block", 0, {}), ("block", 0, {"draws": 2}), ("full", 0, {"size": 6, "draws": 2}), ("full", 1, {"size": 5, "draws": 0})],
)
def test_the_block_loss_equals_dense_brute_force(kind, shift, options):
    lm = with_spec(tiny(kind)[0], logit_shift=shift)
    size = lm.spec.block_size
    records = []
    for number, ids in enumerate(prompts(tiny(kind)[1], 4)):
        length = 9 + number if not size else 9 + number + -(len(ids) + 9 + number) % size
        answer = demonstration(0, length, 0, seed=number).response_ids
        records.append(committed(f"p{number}", ids, answer, np.arange(length, dtype=np.int32), block_size=size))
    objective = objective_of("block", **options)
    with torch.no_grad():
        loss, samples = packed_loss(lm, records, objective, np.random.default_rng(5))
        total = 0.0
        for sample in samples:
            weight = iter(sample.policy_weight)
            for masked, scored in zip(sample.masked, sample.scored, strict=True):
                for at in np.flatnonzero(scored):
                    end = len(sample.response_ids)
                    if size:  # all that the token may see: clean blocks, then its own, noisy
                        prompt = len(sample.prompt_ids)
                        start, end = ((prompt + at) // size * size - prompt, ((prompt + at) // size + 1) * size - prompt)
                    noisy = np.where(masked, lm.spec.mask_token_id, sample.response_ids)
                    clean = sample.response_ids[: max(start, 0)] if size else noisy[:0]
                    shown = np.concatenate([clean, noisy[len(clean) : end]])
                    logp = stock_logp(lm, sample.prompt_ids, shown, size)[at, int(sample.response_ids[at])]
                    total -= next(weight) * float(logp)
    assert float(loss) == pytest.approx(total, abs=2e-6)
    assert sum(s.policy_weight.sum() for s in samples) == pytest.approx(1.0, abs=1e-6)


def test_certainty_by_hand():
    lm, _ = tiny("full")
    record = demonstration(4, 12, 0, seed=3)
    objective = objective_of("certainty", size=6, entropy_weight=3.0, entropy_temperature=0.7)
    plan = plan_update([record], objective, np.random.default_rng(0))
    batches, every = Batches(plan.samples, lm.spec, torch.device("cpu")), list(range(len(plan.samples)))
    packed = batches.packed(every)
    inputs = (packed.input_ids, packed.position_ids, packed.plan(), packed.index)
    with torch.no_grad():
        best = lm.logits(lm.hidden(*inputs[:3]).flatten(0, 1)[packed.index]).argmax(-1)
        targets = torch.where(torch.arange(len(best)) % 2 == 0, best, packed.targets)  # half of them right for certain
        logits = lm.logits(lm.hidden(*inputs[:3]).flatten(0, 1)[packed.index])
        cool = (logits / 0.7).softmax(-1)
        spread = -(cool * cool.clamp_min(1e-30).log()).sum(-1) * (best == targets)
        logp, entropy = lm(*inputs, targets, 1.0, "right", 0.7)
    assert entropy == pytest.approx(spread, abs=1e-5) and 0 < int((best == targets).sum()) < len(best)
    terms = objective.loss(logp, logp, batches.entries(every), entropy=entropy)
    weight = batches.entries(every).policy_weight
    hand = -(weight * logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]).sum() + 3.0 * (weight * spread).sum()
    assert float(terms.loss) == pytest.approx(float(hand), abs=1e-5)
    assert float(terms.sums["certainty_loss"]) == pytest.approx(float(3.0 * (weight * spread).sum()), abs=1e-5)


def test_the_gradient_of_certainty_equals_finite_differences():
    lm = copy.deepcopy(tiny("block")[0])
    packed = Batches(
        plan_update([demonstration(4, 8, 4, seed=7)], objective_of("certainty"), np.random.default_rng(0)).samples,
        lm.spec,
        torch.device("cpu"),
    ).packed([0])
    inputs = (packed.input_ids, packed.position_ids, packed.plan(), packed.index)
    with torch.no_grad():
        best = lm.logits(lm.hidden(*inputs[:3]).flatten(0, 1)[packed.index]).argmax(-1)

    def loss() -> torch.Tensor:
        logp, entropy = lm(*inputs, best, 1.0, "right", 0.5)
        return (2.0 * entropy - logp).sum()

    loss().backward()
    rng = np.random.default_rng(0)
    for parameter in (lm.lm.lm_head.weight, lm.lm.model.layers[0].mlp.up_proj.weight):
        direction = torch.from_numpy(rng.normal(size=parameter.shape)).float()
        direction /= direction.norm()
        slope, step, ends = float((parameter.grad * direction).sum()), 2e-2, []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * step * direction
                ends.append(float(loss()))
                parameter -= sign * step * direction
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize(
    ("objective", "options", "match"),
    [
        ("block", {"sise": 4}, "sft.options.sise.*did you mean size"),
        ("random_mask", {"complement": True}, "sft.options.share=0.0"),
        ("random_mask", {"draws": -1}, "sft.options.draws=-1"),
        ("trace", {"shrink": 0}, "sft.options.shrink=0"),
        ("certainty", {"entropy_temperature": 0.0}, "entropy_temperature=0.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(objective, options, match):
    with pytest.raises(ConfigError, match=match):
        learner_config(RunConfig(sft=SftConfig(objective=objective, options=options)))


def test_blocks_that_a_trajectory_was_decoded_in_go_before_size():
    record = replace(demonstration(3, 12, 0), decoder={"block_size": 4})
    rows = MaskedBlocks(size=6, draws=0).plan(record, np.random.default_rng(0))
    assert len(rows) == 3 and len(MaskedBlocks(draws=0).plan(record, np.random.default_rng(0))) == 1
