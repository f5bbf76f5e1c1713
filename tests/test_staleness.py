"""Tokens that older weights drew: which they are, how they are weighed, and what that makes of the gradient."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from test_learner import logp_of
from test_learner_samples import step_plan
from test_objectives_toy import LENGTH, MASK, WORDS, model, named, parameters, score
from test_objectives_toy import toy as responses_of
from tiny_models import prompts, tiny

from rlpipe import parity
from rlpipe.config import AlgoConfig, DecoderConfig, LearnerConfig
from rlpipe.learner import policy
from rlpipe.learner.batches import Batches
from rlpipe.learner.engine import merge_sums
from rlpipe.learner.micro_batches import make_shards
from rlpipe.learner.samples import Sample
from rlpipe.learner.step import plan_step, token_lags
from rlpipe.objectives.entries import Entries
from rlpipe.objectives.objective import build_objective
from rlpipe.objectives.planner import Replay
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.request import Request
from rlpipe.trajectory import replace

OLD, NEW = 3, 4
FLOATS = ("rollout_logp", "advantage", "policy_weight", "kl_weight", "lag")
NAN = float("nan")


def crossed(kind: str, recompute: bool = True):
    """(old model, new model, eight trajectories in two groups): the weights changed while most of them were under way."""
    old, tokenizer = tiny(kind)
    new, _ = tiny(kind, seed=1)
    current = copy.deepcopy(old)
    tokens = [ids for ids in prompts(tokenizer, 2) for _ in range(4)]
    requests = [
        Request(prompt_ids=ids, uid=f"p{i // 4}", sample=i % 4, seed=i, max_tokens=10 + i) for i, ids in enumerate(tokens)
    ]
    decoder = Decoder.resolve(DecoderConfig(stop="length"), current.spec)
    session = Engine(current).session(requests, decoder=decoder, version=OLD, slots=6)

    def load() -> int:
        current.load_state_dict(new.state_dict())
        return NEW

    found = [None] * len(requests)
    for step in itertools.count():
        if step == 5:
            session.update(load, recompute)
        done = session.step()
        for index, trajectory in zip(*done, strict=True) if done else ():
            found[index] = trajectory
        if not len(session.canvas):
            return old, new, found


def planned(records, version, preset="tracerl", gauge=0, **algo):
    objective = build_objective(AlgoConfig(preset=preset, **algo), 20)
    advantages = np.random.default_rng(1).normal(size=len(records)).astype(np.float32)
    rng = np.random.default_rng(0)
    plan = plan_step(records, advantages, objective, updates=2, gauge_trajectories=gauge, rng=rng, version=version)
    return plan, objective


def replayed(network, sample: Sample) -> np.ndarray:
    with torch.no_grad():
        return logp_of(network, sample).numpy()


def test_the_lag_of_a_token_is_its_blocks_or_the_responses_oldest():
    _, _, (block, *_) = crossed("block")
    first = block.prompt_len // block.block_size
    versions = np.array([2, 2, 3, 4, 4, 4, 4, 4][: len(block.versions)], np.int32)
    lags = token_lags(replace(block, versions=versions), 4)
    for place, lag in enumerate(lags):
        assert lag == 4 - versions[(block.prompt_len + place) // block.block_size - first]
    _, _, (*_, full) = crossed("full")  # the longest begins first
    assert full.versions.tolist() == [OLD] and (token_lags(full, 6) == 3).all()
    assert not token_lags(full, None).any() and len(token_lags(full, None)) == full.response_len


@pytest.mark.parametrize("kind", ("block", "full"))
def test_a_step_of_its_own_weights_is_what_it_is_without_versions(kind):
    for algo in ({}, {"shrink": 2}, {"preset": "coupled_grpo"}):
        _, records = step_plan(kind, **algo)
        (one, _), (other, _) = planned(records, None, gauge=2, **algo), planned(records, 0, gauge=2, **algo)
        assert one.updates == other.updates and one.gauge == other.gauge
        for a, b in zip(one.samples, other.samples, strict=True):
            assert all(np.array_equal(getattr(a, k), getattr(b, k), equal_nan=True) for k in FLOATS) and a.on_policy.all()


def test_blocks_of_older_weights_are_weighed_and_the_others_compared():
    """Under block attention every token is known to be of one version or the other, and replays under it."""
    old, new, records = crossed("block")
    plan, _ = planned(records, NEW)
    batches = Batches(plan.samples, new.spec, torch.device("cpu"))
    seen = set()
    for index, sample in enumerate(plan.samples):
        assert set(np.unique(sample.lag)) <= {0, 1} and (sample.on_policy == (sample.lag == 0)).all()
        seen |= set(sample.lag.tolist())
        behaviour, recorded = batches.behaviour([index]).numpy(), sample.rollout_logp
        assert np.isnan(behaviour[sample.lag == 0]).all()
        np.testing.assert_array_equal(behaviour[sample.lag == 1], recorded[sample.lag == 1])
        here, before = replayed(new, sample), replayed(old, sample)
        assert np.abs(here - recorded)[sample.lag == 0].max(initial=0) <= 1e-5
        assert np.abs(before - recorded)[sample.lag == 1].max(initial=0) <= 1e-5
    assert seen == {0, 1}
    everything = list(range(len(plan.samples)))
    stale = sum(int((s.lag == 1).sum()) for s in plan.samples)
    assert batches.off_policy(everything) == {"stale_tokens": stale, "uncorrected_tokens": 0}


def test_a_whole_canvas_keeps_its_oldest_version_and_its_records_weigh_the_rest_by_one():
    """Only the oldest version is known, so nothing is compared; but what the newest weights drew has the ratio 1 by itself."""
    old, new, records = crossed("full")
    plan, _ = planned(records, NEW)
    by_new = by_old = 0
    for sample in (s for s in plan.samples if s.lag.all()):
        gap = np.abs(replayed(new, sample) - sample.rollout_logp), np.abs(replayed(old, sample) - sample.rollout_logp)
        by_new, by_old = by_new + int((gap[0] <= 1e-5).sum()), by_old + int((gap[1] <= 1e-5).sum())
        assert (np.minimum(*gap) <= 1e-5).all(), "recorded under the weights of its own commit, whichever these were"
    assert by_new and by_old


def test_old_keys_under_new_weights_are_nobodys_distribution():
    _, new, records = crossed("block", recompute=False)
    plan, _ = planned(records, NEW)
    batches = Batches(plan.samples, new.spec, torch.device("cpu"))
    changed = [i for i, s in enumerate(plan.samples) if not s.exact]
    assert changed and any((plan.samples[i].lag == 0).any() for i in changed)
    for index in changed:
        np.testing.assert_array_equal(batches.behaviour([index]).numpy(), plan.samples[index].rollout_logp)


def test_rows_of_other_states_cannot_be_weighed_and_are_counted():
    _, new, records = crossed("block")
    plan, _ = planned(records, OLD, preset="coupled_grpo", gauge=3, ratio="position")
    batches = Batches(plan.samples, new.spec, torch.device("cpu"))
    trained = [i for update in plan.updates for i in update]
    assert batches.behaviour(trained).isnan().all()
    sums = batches.off_policy(trained)
    assert sums["stale_tokens"] == sums["uncorrected_tokens"] > 0
    fresh = [number for number, trajectory in enumerate(records) if OLD in trajectory.versions]
    assert fresh[0] > 0 and [plan.owner[i] for i in plan.gauge] == fresh[:3], "what can be compared comes first"


class Engineless:
    """In the place of the learner's engine: gradients are added up and nothing moves."""

    def __init__(self, model, config, lr, total_updates, tag):
        self.model = self.module = model
        self.config, self.device, self.rank = config, torch.device("cpu"), 0

    def update(self, batches, loss_of) -> dict:
        sums: dict[str, float] = {}
        for batch in batches:
            loss, part = loss_of(batch)
            loss.backward()
            merge_sums(sums, part)
        return {"sums": sums, "grad_norm": 1.0, "lr": 0.0}


@pytest.mark.parametrize("ratio", ("token", "step", "sequence"))
@pytest.mark.parametrize("kind", ("block", "full"))
def test_the_learner_weighs_and_reports_them(kind, ratio, monkeypatch):
    monkeypatch.setattr(policy, "Engine", Engineless)
    _, new, records = crossed(kind)
    plan, objective = planned(records, NEW, ratio=ratio, importance_cap=1.5)
    learner = policy.PolicyLearner(copy.deepcopy(new), objective, LearnerConfig(), 1.0, 1)
    found = learner.train(make_shards(plan.samples, plan.updates, [], 200, 1)[0], 1)
    gradient = [p.grad.clone() for p in learner.engine.model.parameters() if p.grad is not None]

    network, weights = copy.deepcopy(new), []
    for sample in (plan.samples[i] for update in plan.updates for i in update):
        logp = logp_of(network, sample)
        log_ratio = np.where(sample.lag == 0, 0.0, logp.detach().numpy() - sample.rollout_logp)
        unit = sample.unit if len(sample.unit) else np.arange(sample.num_scored)
        joint = np.bincount(unit, log_ratio, len(sample.advantage))
        weight = np.minimum(np.exp(joint), 1.5)
        weights += weight[np.bincount(unit, sample.lag != 0, len(weight)) > 0].tolist()
        scale = torch.from_numpy(sample.policy_weight * sample.advantage * weight)[torch.from_numpy(unit)]
        share = torch.from_numpy(sample.coefficient) if len(sample.unit) else 1.0
        (-(scale * share * logp).sum()).backward()  # the ratio is 1 where the step opens, so this is its gradient
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    for ours, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-3, atol=1e-5)

    metrics = objective.finalize_updates(found["updates"])
    tokens = np.concatenate([sample.lag for sample in plan.samples])
    assert metrics["algo/stale_share"] == pytest.approx((tokens > 0).mean()) and metrics["algo/uncorrected_share"] == 0
    assert metrics["algo/importance_mean"] == pytest.approx(np.mean(weights), rel=1e-4)
    assert metrics["algo/importance_min"] == pytest.approx(min(weights), rel=1e-3)
    assert metrics["algo/importance_truncated"] == pytest.approx(np.mean(np.array(weights) >= 1.5))
    assert metrics["algo/importance_max"] >= max(weights) - 1e-4
    gauged = parity.measure(*(found[name] for name in ("learner", "rollout", "exact", "lag")), 0.2, 0.2)
    assert gauged["parity/stale_tokens"] == (tokens > 0).sum() and "parity/gap_tokens" not in gauged
    assert gauged["parity/tokens"] == (tokens == 0).sum() and gauged.get("parity/max_abs_delta", 0.0) <= 1e-5
    assert gauged["parity/stale_gap_1"] < -0.01 and (kind == "full" or gauged["parity/tokens"])


# The expectation of the gradient, by enumeration of all responses of three tokens and four words.

REWARD = np.random.default_rng(7).normal(size=(WORDS,) * LENGTH)
EVERY = list(itertools.product(range(WORDS), repeat=LENGTH))


def all_responses(steps):
    """Every response, decoded in the given order of steps, with its rows and its reward."""
    trajectories = [responses_of([steps], [words])[0] for words in EVERY]
    rows = [Replay().plan(trajectory, np.random.default_rng(0)) for trajectory in trajectories]
    return trajectories, rows, np.array([REWARD[words] for words in EVERY])


def expected_gradient(objective, theta, drawn_by, steps, behaviour=None) -> torch.Tensor:
    """Gradient at theta of the loss expected over responses that are drawn with probability exp(drawn_by), their tokens'
    recorded log-probabilities being `behaviour` [entries], NaN for the policy's own; a response weighs by its probability."""
    trajectories, rows, rewards = all_responses(steps)
    theta = theta.clone().requires_grad_()
    logp = score(theta, rows, trajectories)
    units = [objective.units(part, trajectory) for part, trajectory in zip(rows, trajectories, strict=True)]
    sizes = [len(unit) for unit in units]
    starts = np.cumsum([0, *sizes[:-1]])
    chance = drawn_by.view(len(EVERY), LENGTH).sum(1).exp().numpy()
    ones = torch.ones(sum(sizes), dtype=torch.float64)
    entries = Entries(
        unit=torch.from_numpy(np.concatenate([u.entry.astype(np.int64) + s for u, s in zip(units, starts, strict=True)])),
        coefficient=torch.from_numpy(np.concatenate([unit.coefficient.astype(np.float64) for unit in units])),
        advantage=ones * torch.from_numpy(np.repeat(rewards, sizes)),
        policy_weight=ones * torch.from_numpy(np.repeat(chance, sizes)),
        kl_weight=ones,
    )
    loss = objective.loss(logp, logp.detach(), entries, behaviour_logp=behaviour).loss
    return torch.autograd.grad(loss, theta)[0]


def two_policies(step: float = 0.4, steps=(1, 2, 3)):
    """(theta, log-probabilities of all responses' tokens under it, under an older policy)."""
    trajectories, rows, _ = all_responses(list(steps))
    theta = parameters(0)
    return theta, score(theta, rows, trajectories), score(parameters(1, theta, step), rows, trajectories)


@pytest.mark.parametrize("steps", ([1, 2, 3], [3, 1, 2], [1, 1, 2]))
def test_whole_responses_are_weighed_to_exactly_the_policys_own_gradient(steps):
    objective = named("tracerl", ratio="sequence", importance_cap=np.inf)
    theta, own, older = two_policies(steps=steps)
    wanted = expected_gradient(objective, theta, own, steps)
    torch.testing.assert_close(expected_gradient(objective, theta, older, steps, older), wanted, rtol=1e-9, atol=1e-12)
    plain = expected_gradient(objective, theta, older, steps)
    assert (plain - wanted).norm() > 0.2 * wanted.norm(), "the older policy is far enough away for this to say something"


@pytest.mark.parametrize("stale", (1, 2))
def test_responses_that_crossed_an_update_are_weighed_by_their_older_tokens_alone(stale):
    """The first tokens were drawn by the older policy, the rest by the one that opens the step: the joint ratio is that of the
    first ones, and the gradient is exactly the policy's own again."""
    objective = named("tracerl", ratio="sequence", importance_cap=np.inf)
    theta, own, older = two_policies()
    is_stale = torch.arange(LENGTH).repeat(len(EVERY)) < stale  # rows are in the order of the steps
    drawn_by = torch.where(is_stale, older, own)
    behaviour = torch.where(is_stale, older, NAN)
    wanted = expected_gradient(objective, theta, own, [1, 2, 3])
    mixed = expected_gradient(objective, theta, drawn_by, [1, 2, 3], behaviour)
    torch.testing.assert_close(mixed, wanted, rtol=1e-9, atol=1e-12)
    filled = expected_gradient(objective, theta, drawn_by, [1, 2, 3], drawn_by)
    torch.testing.assert_close(mixed, filled, rtol=1e-12, atol=1e-15)


def surrogate_gradient(theta, older_logp, order) -> torch.Tensor:
    """Gradient of -Σ_steps E[state ~ older] Σ_words p(word | state) Q_older(state, word), by plain loops; one token a step."""
    theta = theta.clone().requires_grad_()
    older = {words: part for words, part in zip(EVERY, older_logp.view(len(EVERY), LENGTH), strict=True)}
    total = torch.zeros((), dtype=torch.float64)
    for t, position in enumerate(order):
        before = order[:t]
        for shown in itertools.product(range(WORDS), repeat=t):
            canvas = np.full((1, LENGTH), MASK)
            canvas[0, before] = shown
            alike = [w for w in EVERY if all(w[p] == s for p, s in zip(before, shown, strict=True))]
            reached = float(older[alike[0]][:t].sum().exp())
            own = model(theta, canvas)[0, position]
            for word in range(WORDS):
                after = [w for w in alike if w[position] == word]
                value = sum(float(older[w][t + 1 :].sum().exp()) * REWARD[w] for w in after)
                total = total - reached * own[word].exp() * value
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("order", ([0, 1, 2], [2, 0, 1]))
def test_tokens_are_weighed_to_the_gradient_of_the_first_order_surrogate(order):
    """With a weight for each token the words are the policy's own, while states and what follows stay the older policy's:
    exactly the gradient of the surrogate of conservative policy iteration and TRPO, not that of the policy's own reward."""
    objective = named("tracerl", ratio="token", importance_cap=np.inf)
    steps = (np.argsort(order) + 1).tolist()
    theta, own, older = two_policies(steps=steps)
    found = expected_gradient(objective, theta, older, steps, older)
    torch.testing.assert_close(found, surrogate_gradient(theta, older, order), rtol=1e-9, atol=1e-12)
    assert (found - expected_gradient(objective, theta, own, steps)).norm() > 1e-3


def test_the_bias_of_weights_per_token_falls_with_the_distance_and_is_less_than_without():
    objective = named("tracerl", ratio="token", importance_cap=np.inf)
    bias = {}
    for distance in (0.2, 0.1, 0.05):
        theta, own, older = two_policies(distance)
        wanted = expected_gradient(objective, theta, own, [1, 2, 3])
        pair = (expected_gradient(objective, theta, older, [1, 2, 3], behaviour) for behaviour in (older, None))
        bias[distance] = [float((one - wanted).norm()) for one in pair]
        assert bias[distance][0] < bias[distance][1]
    for near, far in ((0.05, 0.1), (0.1, 0.2)):
        assert 1.6 < bias[far][0] / bias[near][0] < 2.6, "of first order in the distance"


@pytest.mark.parametrize("steps", ([1, 1, 2], [1, 2, 2]))
def test_tokens_of_one_step_have_one_weight_under_the_ratio_of_steps(steps):
    """The action is all of what a step commits: the joint ratio of its tokens, over the older policy's states."""
    objective = named("tracerl", ratio="step", importance_cap=np.inf)
    theta, own, older = two_policies(steps=steps)
    by_row = older.view(len(EVERY), LENGTH), own.view(len(EVERY), LENGTH)  # entries lie row by row: step 1's, then step 2's
    sizes = [steps.count(1), steps.count(2)]
    hybrid = torch.zeros_like(theta)
    for size, cut in zip(sizes, np.cumsum([0, *sizes[:-1]]), strict=True):
        mine = (torch.arange(LENGTH) >= cut) & (torch.arange(LENGTH) < cut + size)
        drawn = torch.where(mine, by_row[1], by_row[0]).flatten()  # this step by the policy itself, the others by the older one
        hybrid += only_step(objective, theta, drawn, steps, mine)
    found = expected_gradient(objective, theta, older, steps, older)
    torch.testing.assert_close(found, hybrid, rtol=1e-9, atol=1e-12)


def only_step(objective, theta, drawn_by, steps, mine) -> torch.Tensor:
    """The policy gradient of the tokens of one step alone."""
    trajectories, rows, rewards = all_responses(steps)
    theta = theta.clone().requires_grad_()
    logp = score(theta, rows, trajectories).view(len(EVERY), LENGTH)
    chance = drawn_by.view(len(EVERY), LENGTH).sum(1).exp()
    loss = -(chance * torch.from_numpy(rewards) * (logp * mine).sum(1)).sum()
    return torch.autograd.grad(loss, theta)[0]


@pytest.mark.parametrize("unit", (1, LENGTH))
def test_the_cap_bounds_every_weight_and_what_is_far_away_says_so(unit):
    """Tokens, and whole responses; the largest ratio is reported as it was."""
    _, own, older = two_policies(0.8)
    ones = torch.ones(len(own) // unit, dtype=torch.float64)
    parts = {"advantage": ones, "policy_weight": ones, "kl_weight": ones}
    entries = Entries(unit=torch.arange(len(own)) // unit, coefficient=torch.ones_like(own), **parts)
    for cap in (1.0, 2.0, 1e3, np.inf):
        objective = named("tracerl", importance_cap=cap)
        terms = objective.loss(own, own, entries, behaviour_logp=older)
        metrics = objective.finalize(terms.sums)
        assert metrics["algo/importance_min"] <= metrics["algo/importance_mean"] <= cap
        assert metrics["algo/importance_max"] > 2.0 and (metrics["algo/importance_truncated"] > 0) == (cap < 1e3)
        assert float(terms.loss) == pytest.approx(-len(ones) * metrics["algo/importance_mean"], rel=1e-5)


def test_the_joint_ratio_by_hand():
    """Two units of three entries: one with one stale entry, one with none."""
    entries = Entries(
        unit=torch.tensor([0, 0, 0, 1, 1, 1]),
        coefficient=torch.full((6,), 1 / 3),
        advantage=torch.ones(2),
        policy_weight=torch.ones(2),
        kl_weight=torch.ones(2),
    )
    old = torch.log(torch.tensor([0.5, 0.4, 0.2, 0.9, 0.8, 0.7]))
    behaviour = torch.log(torch.tensor([NAN, 0.1, NAN, NAN, NAN, NAN]))
    joint = entries.log_importance(old, behaviour)
    assert joint[0] == pytest.approx(np.log(4.0), rel=1e-6) and joint[1].isnan()
    objective = build_objective(AlgoConfig(importance_cap=3.0))
    sums = objective.loss(old, old, entries, behaviour_logp=behaviour).sums
    assert float(sums["off_policy_units"]) == 1 and float(sums["max_importance"]) == pytest.approx(4.0)
    assert objective.finalize(sums)["algo/importance_mean"] == 3.0
    total: dict[str, float] = {}
    for part in (sums, sums | {"max_importance": 1.0, "max_negated_importance": -0.5}):
        merge_sums(total, {name: float(value) for name, value in part.items()})
    merged = objective.finalize(total)
    assert merged["algo/importance_max"] == pytest.approx(4.0) and merged["algo/importance_min"] == 0.5


def test_samples_of_the_same_weights_are_untouched_by_their_weight():
    """A step without stale tokens is the same to the bit, whether behaviour is asked for or not."""
    plan, _ = step_plan("block")
    batches = Batches(plan.samples, tiny("block")[0].spec, torch.device("cpu"))
    everything = list(range(len(plan.samples)))
    objective, entries = build_objective(AlgoConfig(), 10), batches.entries(everything)
    old = torch.from_numpy(np.concatenate([s.rollout_logp for s in plan.samples]))
    one = objective.loss(old + 0.01, old, entries)
    other = objective.loss(old + 0.01, old, entries, behaviour_logp=batches.behaviour(everything))
    assert one.loss == other.loss and one.sums == other.sums and batches.off_policy(everything) == {}
    older = [dataclasses.replace(s, lag=np.ones_like(s.lag)) for s in plan.samples]
    behaviour = Batches(older, tiny("block")[0].spec, torch.device("cpu")).behaviour(everything)
    changed = objective.loss(old, old, entries, behaviour_logp=behaviour)
    assert float(changed.sums["importance"]) == float(changed.sums["off_policy_units"]) == len(old)
