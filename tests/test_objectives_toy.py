"""Every method on a model small enough to enumerate: three tokens, four words, full attention, float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_objectives import predicted, trajectory_of

from rlpipe.config import AlgoConfig
from rlpipe.objective_presets import algo_settings
from rlpipe.objectives.bounds import Sandwich
from rlpipe.objectives.entries import Entries
from rlpipe.objectives.losses import ratio_of
from rlpipe.objectives.objective import PRESETS, Objective, build_objective
from rlpipe.objectives.planner import Replay
from rlpipe.objectives.rows import Rows
from rlpipe.trajectory import EventLog, Predictions, Trajectory, replace

LENGTH, WORDS, MASK, WIDTH = 3, 4, 4, 5
SIZES = ((LENGTH * (WORDS + 1), WIDTH), (WIDTH, LENGTH * WORDS))
STEPS = [[2, 1, 3], [1, 3, 2], [1, 1, 2], [3, 2, 1]]
TOKENS = [[0, 2, 1], [3, 1, 0], [2, 2, 3], [1, 0, 3]]
REWARDS = np.array([1.0, 0.0, 0.3, 0.6])


def parameters(seed: int, near: torch.Tensor | None = None, step: float = 0.05) -> torch.Tensor:
    """Flat float64 weights of the model, drawn, or some steps away from others."""
    draw = torch.from_numpy(np.random.default_rng(seed).normal(size=sum(a * b for a, b in SIZES)))
    return 0.5 * draw if near is None else near + step * draw


def model(theta: torch.Tensor, canvas: np.ndarray) -> torch.Tensor:
    """canvas int[R, L] → log-probabilities [R, L, words]."""
    split = SIZES[0][0] * SIZES[0][1]
    first, second = theta[:split].view(SIZES[0]), theta[split:].view(SIZES[1])
    seen = torch.eye(WORDS + 1, dtype=torch.float64)[torch.from_numpy(canvas.astype(np.int64))].flatten(1)
    return (torch.tanh(seen @ first) @ second).view(-1, LENGTH, WORDS).log_softmax(-1)


def score(theta: torch.Tensor, rows: Sequence[Rows], trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """Log-probabilities [M] of the scored entries, response after response, row-major."""
    found = []
    for part, trajectory in zip(rows, trajectories, strict=True):
        if not len(part):
            continue
        answer = np.broadcast_to(trajectory.response_ids, part.scored.shape)
        logp = model(theta, np.where(part.masked, MASK, answer))
        target = torch.from_numpy((answer if part.targets is None else part.targets).astype(np.int64))
        found.append(logp.gather(2, target.unsqueeze(-1)).squeeze(-1)[torch.from_numpy(part.scored)])
    return torch.cat(found)


def collate(
    objective: Objective, rows: Sequence[Rows], trajectories: Sequence[Trajectory], rewards=REWARDS, only=None
) -> tuple[Entries, torch.Tensor]:
    """The entries of the responses `only` (default all), weighed as parts of the whole update; and which of all entries they
    are, int64 [M]."""
    units = [objective.units(part, trajectory) for part, trajectory in zip(rows, trajectories, strict=True)]
    policy, kl = objective.weights(units, [t.response_len for t in trajectories])
    advantages = objective.advantages(rewards)
    chosen = range(len(rows)) if only is None else only
    columns: dict[str, list] = {name: [] for name in Entries.__slots__}
    start = positions_before = 0
    for i in chosen:
        position = np.nonzero(rows[i].scored)[1]
        credit = np.full(len(units[i]), advantages[i]) if units[i].credit is None else units[i].credit
        for name, value in {
            "unit": units[i].entry.astype(np.int64) + start,
            "coefficient": units[i].coefficient.astype(np.float64),
            "advantage": credit.astype(np.float64),
            "policy_weight": policy[i].astype(np.float64),
            "kl_weight": kl[i].astype(np.float64),
            "position": position + positions_before,
        }.items():
            columns[name].append(value)
        start += len(units[i])
        positions_before += rows[i].response_len
    owner = np.repeat(np.arange(len(rows)), [part.num_scored for part in rows])
    entries = Entries(**{name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()})
    return entries, torch.from_numpy(np.concatenate([np.flatnonzero(owner == i) for i in chosen]))


def toy(steps=STEPS, tokens=TOKENS) -> list[Trajectory]:
    """A group of rollouts with predictions and step rewards, so that every method can plan it."""
    made = []
    for trajectory, words in zip(predicted(steps), tokens, strict=True):
        words = np.array(words, np.int32)
        columns = {name: getattr(trajectory.events, name) for name in EventLog.DTYPES}
        columns["token"] = words[columns["position"]]
        columns["confidence"] = np.linspace(0.2, 0.8, len(columns["token"])).astype(np.float32)
        drawn = trajectory.predictions.tokens % WORDS
        last = np.array(trajectory.step_map()) <= np.arange(1, len(drawn) + 1)[:, None]
        drawn = np.where(last, words, drawn).astype(np.int32)  # what is committed by then is the answer's
        predictions = Predictions(step=trajectory.predictions.step, tokens=drawn, confidence=trajectory.predictions.confidence)
        made.append(replace(trajectory, response_ids=words, events=EventLog(**columns), predictions=predictions))
    return made


def named(name: str, **changes) -> Objective:
    settings = AlgoConfig(**algo_settings(name) | changes)
    return build_objective(settings, max_tokens=LENGTH)


VARIANTS = [(name, {}) for name in PRESETS]
VARIANTS += [("tracerl", {"ratio": kind, "kl_coef": 0.1, "kl_estimator": "k2"}) for kind in ("position", "step", "sequence")]
VARIANTS += [("coupled_grpo", {"ratio": "token"}), ("espo", {"ratio": "token", "normalizer": "response_sum"})]
VARIANTS += [("tracerl", {"clip_dual": 1.25, "clip_low": 0.05, "clip_high": 0.05}), ("tracerl", {"clip_dynamic": True})]
VARIANTS += [("wd1", {"kl_coef": 0.1, "kl_reference": "initial"}), ("spg", {"kl_coef": 0.1}), ("dipo", {"score_share": 0.5})]
VARIANTS += [("cj_grpo", {"random_share": 0.5}), ("mdpo", {"ratio": "step", "random_share": 0.3})]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_gradients_equal_finite_differences(name, changes):
    """Off-policy, against a third model as reference, away from the kinks of the clip."""
    objective, trajectories = named(name, **changes), toy()
    rows = objective.plan_all(trajectories, np.random.default_rng(1))
    entries, _ = collate(objective, rows, trajectories)
    theta = parameters(0).requires_grad_()
    old, ref = (score(parameters(seed, theta.detach()), rows, trajectories) for seed in (1, 2))
    behaviour = torch.where(torch.arange(len(old)) % 3 == 0, old + 0.05, torch.nan)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        logp = score(weights, rows, trajectories)
        return objective.loss(logp, old, entries, ref_logp=ref, behaviour_logp=behaviour).loss

    (gradient,) = torch.autograd.grad(loss(theta), theta)
    ratio = ratio_of(entries.join(score(theta, rows, trajectories)), entries.join(old))
    assert (ratio - 1).abs().max() > 0.01 and gradient.abs().max() > 1e-3
    for bound in objective._clip().bounds(entries.join(old)):
        assert (ratio - bound).abs().min() > 1e-4, "a kink: choose other numbers"
    with torch.no_grad():
        numeric = torch.empty_like(gradient)
        for i in range(len(theta)):
            ahead, behind = theta.detach().clone(), theta.detach().clone()
            ahead[i] += 1e-5
            behind[i] -= 1e-5
            numeric[i] = (loss(ahead) - loss(behind)) / 2e-5
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_the_loss_adds_over_micro_batches(name):
    objective, trajectories = named(name), toy()
    rows = objective.plan_all(trajectories, np.random.default_rng(1))
    theta = parameters(0)
    columns = [score(parameters(seed, theta), rows, trajectories) for seed in (0, 1, 2)]

    def total(parts) -> tuple[float, dict[str, float]]:
        loss, sums = 0.0, {}
        for part in parts:
            entries, mine = collate(objective, rows, trajectories, only=part)
            if not len(mine):
                continue
            logp, old, ref = (column[mine] for column in columns)
            terms = objective.loss(logp, old, entries, ref_logp=ref, entropy=torch.ones_like(logp))
            loss += float(terms.loss)
            for key, value in terms.sums.items():
                biggest = key.startswith("max_")
                sums[key] = max(sums.get(key, 0.0), float(value)) if biggest else sums.get(key, 0.0) + float(value)
        return loss, sums

    whole, sums = total([range(4)])
    assert sums["tokens"] == sum(part.num_scored for part in rows)
    for parts in ([[0], [1], [2], [3]], [[2, 0], [3, 1]], [[3, 2, 1], [0]]):
        loss, split = total(parts)
        assert loss == pytest.approx(whole, abs=1e-12) and split == pytest.approx(sums, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_ratios_are_one_before_the_first_update(name):
    """Equality 7: old log-probabilities come from the same rows, so nothing has moved, whatever the masks were."""
    objective, trajectories = named(name), toy()
    rows = objective.plan_all(trajectories, np.random.default_rng(1))
    logp = score(parameters(0), rows, trajectories)
    entries, _ = collate(objective, rows, trajectories)
    metrics = objective.finalize(objective.loss(logp, logp, entries, ref_logp=logp).sums)
    assert metrics["algo/ratio_mean"] == 1.0 and metrics["algo/clip_fraction"] == 0.0
    assert metrics["algo/approx_kl"] == metrics["algo/ref_kl"] == metrics["algo/kl_loss"] == 0.0
    assert metrics["algo/scored_tokens"] == len(logp)


def test_metrics_are_per_unit_and_the_entropy_per_token():
    objective, trajectories = named("espo"), toy()
    rows = objective.plan_all(trajectories, np.random.default_rng(1))
    logp = score(parameters(0), rows, trajectories)
    entries, _ = collate(objective, rows, trajectories)
    terms = objective.loss(logp, logp - 0.1, entries, ref_logp=logp, entropy=torch.full_like(logp, 0.5))
    metrics = objective.finalize(terms.sums)
    assert terms.sums["units"] == 4 and terms.sums["tokens"] == len(logp) > 12
    ratio = ratio_of(entries.join(logp), entries.join(logp - 0.1))
    assert metrics["algo/ratio_mean"] == pytest.approx(float(ratio.mean())) and metrics["algo/entropy"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="kl_reference=initial"):
        objective.loss(logp, logp, entries)
    assert "algo/ref_kl" not in named("tracerl").finalize(named("tracerl").loss(logp, logp, entries).sums)


def chain_rule(theta: torch.Tensor, order: Sequence[int], tokens: Sequence[int]) -> float:
    canvas, total = np.full((1, LENGTH), MASK), 0.0
    for position in order:
        total += float(model(theta, canvas)[0, position, tokens[position]])
        canvas[0, position] = tokens[position]
    return total


def test_rows_of_one_token_steps_are_the_chain_rule():
    """Equality 3: for every order and answer; over all 64 answers the products add up to 1. Left to right it is JustGRPO's."""
    theta, just = parameters(0), named("just_grpo")
    for order in itertools.permutations(range(LENGTH)):
        steps, total = np.argsort(order) + 1, 0.0
        for tokens in itertools.product(range(WORDS), repeat=LENGTH):
            (trajectory,) = toy([steps.tolist()], [tokens])
            rows = [Replay().plan(trajectory, np.random.default_rng(0))]
            logp = score(theta, rows, [trajectory])
            assert float(logp.sum()) == pytest.approx(chain_rule(theta, order, tokens), abs=1e-12)
            total += float(logp.sum().exp())
            straight = just.plan_all([trajectory], np.random.default_rng(0))
            expected = chain_rule(theta, range(LENGTH), tokens)
            assert float(score(theta, straight, [trajectory]).sum()) == pytest.approx(expected, abs=1e-12)
        assert total == pytest.approx(1.0, abs=1e-12)


def losses(objectives: Sequence[Objective], trajectories, seed: int = 1) -> list[float]:
    """Loss of each objective on rows of its own, off-policy."""
    theta, found = parameters(0), []
    for objective in objectives:
        rows = objective.plan_all(trajectories, np.random.default_rng(seed))
        logp, old = score(theta, rows, trajectories), score(parameters(1, theta), rows, trajectories)
        entries, _ = collate(objective, rows, trajectories)
        found.append(float(objective.loss(logp, old, entries, ref_logp=old).loss))
    return found


def test_static_schedules_make_cj_and_tracerl_equal():
    """Equality 1, with one token a step: the mean over rows is the mean over steps, then over responses, and over tokens."""
    trajectories = toy([[2, 1, 3], [1, 3, 2], [1, 2, 3], [3, 2, 1]])
    same = {"advantage": "mean", "clip_low": 0.5, "clip_high": 0.5, "kl_coef": 0.0}
    paper, code = named("cj_grpo", kl_coef=0.0), named("cj_grpo", kl_coef=0.0, normalizer="row_mean")
    tracerl = named("tracerl", normalizer="row_mean", **same)
    rest = [named("tracerl", normalizer=name, **same) for name in ("token_mean", "response_length")]
    first, *others = losses([paper, code, tracerl, *rest], trajectories)
    assert others == pytest.approx([first] * 3 + [first / LENGTH])


def test_all_steps_merged_is_one_segment_is_diffu_grpo():
    """Equality 2, with clean prompts as ours always are."""
    one, two, three = losses(
        [named("tracerl", shrink=9), named("d2_stepmerge", options={"count": 1}), named("diffu_grpo")],
        toy(),
    )
    merged = losses(
        [named("tracerl", shrink=9, **{k: v for k, v in algo_settings("diffu_grpo").items() if k in SHARED})], toy()
    )
    assert two == pytest.approx(three) == pytest.approx(merged[0]) and one != pytest.approx(two)


SHARED = ("advantage", "clip_low", "clip_high", "kl_coef", "kl_reference", "normalizer")


def test_agrpo_over_all_steps_is_cj():
    """Equality 4: as many stratified draws as there are steps of one token."""
    trajectories = toy([[2, 1, 3], [1, 3, 2], [1, 2, 3], [3, 2, 1]])
    cj = named("cj_grpo", kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    one, other = losses([named("agrpo", options={"count": LENGTH}), cj], trajectories)
    assert one == pytest.approx(other)


def test_mdpo_of_committed_tokens_is_cj_with_summed_steps():
    """Equality 5: the answer's tokens, all steps, no weights, and every step with the advantage of the response."""
    trajectories, rng, theta = toy(), np.random.default_rng(0), parameters(0)
    options = {"score": "committed", "weight": "none", "scale": "none", "pick": "all"}
    mdpo, cj = named("mdpo", options=options), named("cj_grpo", normalizer="step_sum", clip_low=0.2, clip_high=0.2)
    rows, replayed = mdpo.plan_all(trajectories, rng), cj.plan_all(trajectories, rng)
    for part, expected, trajectory in zip(rows, replayed, trajectories, strict=True):
        assert np.array_equal(part.masked, expected.masked) and np.array_equal(part.scored, expected.scored)
        assert np.array_equal(part.step, expected.step) and (part.targets == trajectory.response_ids)[part.scored].all()
    assert mdpo.replays_rollout
    credited = [
        dataclasses.replace(part, credit=np.full(len(part), advantage, np.float32))
        for part, advantage in zip(rows, cj.advantages(REWARDS), strict=True)
    ]
    found = []
    for objective, parts in ((mdpo, credited), (cj, replayed)):
        logp, old = score(theta, parts, trajectories), score(parameters(1, theta), parts, trajectories)
        entries, _ = collate(objective, parts, trajectories)
        found.append(float(objective.loss(logp, old, entries, ref_logp=old).sums["policy_loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_part_without_complement_and_joins_is_a_random_mask_row():
    """Equality 6: a masking planner's rows, each token by itself. A row's tokens weigh alike, (L + 1) / L times their mean,
    whatever the size of the part."""
    espo = named("espo", ratio="token", normalizer="response_sum", options={"draws": 1, "complement": False})
    trajectories = toy()
    for seed in range(20):
        rows = espo.plan_all(trajectories, np.random.default_rng(seed))
        units = [espo.units(part, trajectory) for part, trajectory in zip(rows, trajectories, strict=True)]
        live = sum(len(part) > 0 for part in rows)
        for part, unit, weight in zip(rows, units, espo.weights(units, [LENGTH] * 4)[0], strict=True):
            assert len(part) <= 1 and np.array_equal(part.masked, part.scored) and unit.plain
            if len(part):
                assert weight == pytest.approx([(LENGTH + 1) / LENGTH / part.num_scored / live] * part.num_scored)


def naive_sandwich(logp: np.ndarray, rows: Rows, advantage: float, beta: float, mix: float) -> float:
    """The bound of one response, by loops; logp [R, L]."""
    count = len(rows)
    lower = sum(logp[r][rows.scored[r]].mean() for r in range(count)) / count
    seen = np.flatnonzero(rows.scored.any(0))
    upper = 0.0
    for position in seen:
        masking = [r for r in range(count) if rows.scored[r, position]]
        shares = [rows.scored[r].sum() / len(seen) for r in masking]
        inner = sum(np.exp(beta * logp[r, position]) / share for r, share in zip(masking, shares, strict=True)) / count
        upper += np.log(inner) / len(seen) / beta
    return lower if advantage >= 0 else mix * upper + (1 - mix) * lower


def test_the_sandwich_is_its_definition():
    objective, trajectories, theta = named("spg", options={"block": 2, "beta": 1.3, "mix": 0.4}), toy(), parameters(0)
    assert objective.bound == Sandwich(1.3, 0.4)
    for seed in range(20):
        rows = objective.plan_all(trajectories, np.random.default_rng(seed))
        entries, _ = collate(objective, rows, trajectories)
        got = objective.bound.join(score(theta, rows, trajectories), entries)
        for i, (part, trajectory) in enumerate(zip(rows, trajectories, strict=True)):
            logp = np.zeros(part.scored.shape)
            logp[part.scored] = score(theta, [part], [trajectory])
            expected = naive_sandwich(logp, part, float(entries.advantage[i]), 1.3, 0.4)
            assert float(got[i]) == pytest.approx(expected, abs=1e-6)


def test_the_upper_bound_lies_above_the_lower_one():
    """All tokens masked in every row: mean log p against log of the mean of p^beta, beta-th root."""
    trajectory = trajectory_of([1, 2, 3])
    full = np.ones((4, 3), bool)
    part = Rows(masked=full, scored=full, step=np.zeros(4, np.int32), coefficient=np.full((4, 3), 1 / 12, np.float32))
    objective = named("spg")
    entries, _ = collate(objective, [part], [trajectory], np.array([0.0]))
    logp = torch.from_numpy(np.random.default_rng(0).normal(-1, 0.7, 12))
    raised, lowered = (dataclasses.replace(entries, advantage=torch.tensor([sign])) for sign in (1.0, -1.0))
    low, high = (Sandwich(1.5, 1.0).join(logp, chosen) for chosen in (raised, lowered))
    assert float(low) == pytest.approx(float(logp.mean())) and float(high) > float(low) + 0.1
    assert float(Sandwich(1.5, 1.0).join(torch.full((12,), -0.7), lowered)) == pytest.approx(-0.7), "equal where nothing varies"
