"""Objectives as a whole: presets, a published loss end to end, metrics, purity."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from rlpipe.config import AlgoConfig
from rlpipe.errors import ConfigError, RlpipeError
from rlpipe.objectives.entries import Entries
from rlpipe.objectives.losses import importance_weight
from rlpipe.objectives.objective import build_objective
from rlpipe.objectives.planner import RandomMask, Replay
from rlpipe.trajectory import COMMIT, EventLog, Predictions, Trajectory, replace


def trajectory_of(steps: list[int], block_size: int = 0) -> Trajectory:
    order = np.argsort(steps, kind="stable").astype(np.int32)
    zeros = np.zeros(len(steps), np.float32)
    tokens = np.arange(1, len(steps) + 1, dtype=np.int32)
    return Trajectory(
        uid="test/0",
        sample=0,
        seed=0,
        prompt_ids=np.zeros(block_size, np.int32),
        response_ids=tokens,
        valid_len=len(steps),
        block_size=block_size,
        versions=np.zeros(1, np.int32),
        stop="length",
        events=EventLog(
            step=np.sort(steps).astype(np.int32) - 1,
            position=order,
            token=tokens[order],
            kind=np.full(len(steps), COMMIT, np.int8),
            logp=zeros,
            logp_t1=zeros,
            confidence=zeros,
            forced=zeros.astype(bool),
        ),
        decoder={},
    )


def predicted(steps: list[list[int]], seed: int = 0) -> list[Trajectory]:
    """Trajectories of one group, with a prediction and a reward for each denoising step; every one ends in its response."""
    rng, made = np.random.default_rng(seed), []
    for own in steps:
        trajectory, count = trajectory_of(own), max(own)
        tokens = np.repeat(trajectory.response_ids[None], count, 0)
        for step in range(count - 1):  # whatever is not committed now is drawn again later
            again = np.array(own) > step + 1
            tokens[step, again] = rng.integers(1, 5, int(again.sum()))
        made.append(
            replace(
                trajectory,
                predictions=Predictions(
                    step=np.arange(count, dtype=np.int32),
                    tokens=tokens,
                    confidence=rng.uniform(0.1, 0.9, tokens.shape).astype(np.float32),
                ),
                step_rewards=rng.integers(0, 2, count).astype(np.float32) + 0.1 * rng.random(count).astype(np.float32),
            )
        )
    return made


def plain_entries(advantage, policy_weight, kl_weight) -> Entries:
    """Every entry its own unit."""
    ids = torch.arange(len(advantage))
    return Entries(
        unit=None,
        coefficient=None,
        advantage=advantage,
        policy_weight=policy_weight,
        kl_weight=kl_weight,
        position=ids,
    )


def scored_logp() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (of scored tokens, of all) in a published example: rows of [prompt 2 | clean 4 | noisy 4]."""
    i, j, k = torch.meshgrid(torch.arange(2), torch.arange(10), torch.arange(5), indexing="ij")
    logits = ((7 * i + 3 * j + 5 * k) % 11) / 5
    logits = torch.cat([logits[:, :2], logits[:, 6:]], 1)
    labels = torch.tensor([[1, 2, 3, 4, 1, 2], [2, 2, 1, 3, 4, 1]])
    logp = logits.log_softmax(-1).gather(2, labels.unsqueeze(-1)).squeeze(-1)
    return logp[torch.tensor([[0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)], logp


def test_tokens_of_another_distribution_are_weighed_by_a_truncated_ratio():
    """min(p_old / p_behaviour, cap); the loss is linear in it, and NaN (the policy itself drew the token) means 1."""
    nan = float("nan")
    old = torch.log(torch.tensor([0.5, 0.5, 0.2, 0.9]))
    behaviour = torch.log(torch.tensor([0.25, 0.1, 0.4, nan]))
    assert importance_weight(old - behaviour, 3.0).tolist() == pytest.approx([2.0, 3.0, 0.5, 1.0])
    objective = build_objective(AlgoConfig(importance_cap=3.0))
    ones, advantage = torch.ones(4), torch.tensor([1.0, -1.0, 1.0, 1.0])
    terms = objective.loss(old, old, plain_entries(advantage, ones, ones), behaviour_logp=behaviour)
    assert terms.loss.item() == pytest.approx(-(2.0 - 3.0 + 0.5 + 1.0))
    metrics = objective.finalize(terms.sums)
    assert metrics["algo/importance_mean"] == pytest.approx(5.5 / 3)
    assert metrics["algo/importance_truncated"] == pytest.approx(1 / 3)
    plain = objective.loss(old, old, plain_entries(advantage, ones, ones))
    every = objective.loss(old, old, plain_entries(advantage, ones, ones), behaviour_logp=torch.full((4,), nan))
    assert plain.loss == every.loss and "algo/importance_mean" not in objective.finalize(every.sums)


def test_reference_log_probabilities():
    _, logp = scored_logp()
    assert logp.flatten().tolist() == pytest.approx(
        [-1.964372, -2.205913, -2.510818, -1.510818, -1.005913, -2.205913]
        + [-1.310818, -1.310818, -1.005913, -0.81259, -1.510818, -1.550398],
        abs=1e-6,
    )


@pytest.mark.parametrize(
    ("kl_coef", "estimator", "expected"),
    [(0.0, "k3", 0.08721457), (0.01, "k3", 0.08852562), (0.01, "k1", 0.0864144)],
)
def test_published_block_loss(kl_coef, estimator, expected):
    """Two responses of one row each, so that each has its own advantage; the longest response has 4 tokens."""
    algo = AlgoConfig(normalizer="response_length", kl_coef=kl_coef, kl_estimator=estimator)
    objective = build_objective(algo)
    logp, _ = scored_logp()
    rng = np.random.default_rng(0)
    trajectories = [trajectory_of([1, 1]) for _ in range(2)]
    units = [objective.units(r, t) for r, t in zip(objective.plan_all(trajectories, rng), trajectories, strict=True)]
    policy, kl = (torch.from_numpy(np.concatenate(w)) for w in objective.weights(units, [4, 4]))
    advantage = torch.tensor([1.0, 1.0, -0.5, -0.5])
    terms = objective.loss(logp, torch.full((4,), -1.6), plain_entries(advantage, policy, kl))
    assert float(terms.loss) == pytest.approx(expected, abs=1e-6)


def test_published_full_attention_weights():
    """Mean over a row for the policy, sum for the KL: the KL counts n_row times as much."""
    objective = build_objective(AlgoConfig(normalizer="row_mean", kl_normalizer="row_sum"))
    trajectory = trajectory_of([1, 1, 1, 2])
    policy, kl = objective.weights([objective.units(objective.plan(trajectory, np.random.default_rng(0)), trajectory)], [4])
    assert policy[0] == pytest.approx([1 / 6] * 3 + [1 / 2]) and kl[0] == pytest.approx([1 / 2] * 4)


def test_policy_and_kl_have_their_own_weights():
    objective = build_objective(AlgoConfig(kl_coef=0.5, kl_estimator="k2"))
    logp, old, advantage = torch.tensor([0.1, -0.1]), torch.zeros(2), torch.tensor([2.0, 1.0])
    terms = objective.loss(logp, old, plain_entries(advantage, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])))
    assert float(terms.sums["policy_loss"]) == pytest.approx(-2 * np.exp(0.1))
    assert float(terms.sums["kl_loss"]) == pytest.approx(0.5 * 3 * 0.005)
    assert float(terms.loss) == pytest.approx(-2 * np.exp(0.1) + 0.0075)


def test_first_update():
    """Nothing has moved: ratio 1, no KL, nothing clipped, and zero-mean advantages with equal weights lose nothing."""
    objective = build_objective(AlgoConfig(kl_coef=0.1))
    logp = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    advantage = torch.from_numpy(objective.advantages(np.array([1.0, 0.0, 0.0, 1.0])))
    weight = torch.full((4,), 0.25)
    terms = objective.loss(logp, logp.detach(), plain_entries(advantage, weight, weight), entropy=torch.ones(4))
    metrics = objective.finalize(terms.sums)
    assert metrics["algo/ratio_mean"] == 1.0 and metrics["algo/approx_kl"] == metrics["algo/kl_loss"] == 0.0
    assert metrics["algo/clip_fraction"] == metrics["algo/max_abs_log_ratio"] == 0.0
    assert metrics["algo/entropy"] == 1.0 and metrics["algo/scored_tokens"] == 4.0
    assert metrics["algo/loss"] == pytest.approx(0.0)
    terms.loss.backward()
    assert logp.grad.tolist() == pytest.approx((-0.25 * advantage).tolist())
    assert not any(value.requires_grad for value in terms.sums.values())


def test_metrics_of_a_step():
    objective = build_objective(AlgoConfig(kl_coef=0.5))
    old, advantage, weight = torch.zeros(2), torch.tensor([1.0, -1.0]), torch.full((2,), 0.5)
    moved = [torch.tensor([0.5, 0.0]), torch.tensor([0.0, -0.4])]
    terms = [objective.loss(logp, old, plain_entries(advantage, weight, weight)) for logp in moved]
    updates = [
        {"sums": {k: float(v) for k, v in t.sums.items()}, "grad_norm": norm, "lr": lr}
        for t, norm, lr in zip(terms, (1.0, 3.0), (0.1, 0.2), strict=True)
    ]
    metrics = objective.finalize_updates(updates)
    assert metrics["algo/loss"] == pytest.approx(np.mean([float(t.loss) for t in terms]))
    assert metrics["algo/loss"] == pytest.approx(metrics["algo/policy_loss"] + metrics["algo/kl_loss"])
    assert metrics["algo/clip_fraction_low"] == metrics["algo/clip_fraction_high"] == 0.25
    assert metrics["algo/clip_fraction"] == 0.5
    assert metrics["algo/max_abs_log_ratio"] == pytest.approx(0.5)
    assert metrics["algo/ratio_mean"] == pytest.approx((np.exp(0.5) + 2 + np.exp(-0.4)) / 4)
    assert metrics["algo/grad_norm"] == 2.0 and metrics["algo/grad_norm_max"] == 3.0
    assert metrics["algo/lr"] == 0.2 and metrics["algo/updates"] == 2.0 and metrics["algo/scored_tokens"] == 2.0
    assert "algo/entropy" not in metrics
    assert objective.finalize_updates([]) == {"algo/updates": 0.0}


def test_lost_weights_are_loud():
    objective = build_objective(AlgoConfig())
    weight, minus_inf = torch.ones(1), torch.tensor([-float("inf")])
    terms = objective.loss(minus_inf, minus_inf, plain_entries(weight, weight, weight))
    with pytest.raises(RlpipeError, match="probability 0"):
        objective.finalize(terms.sums)
    good = {"sums": {"loss": 0.0, "tokens": 1.0}, "grad_norm": float("nan"), "lr": 1.0}
    with pytest.raises(RlpipeError, match="gradient norm"):
        objective.finalize_updates([good])


def test_presets():
    assert build_objective(AlgoConfig(shrink=2)).planner == Replay(2)
    assert build_objective(AlgoConfig()).replays_rollout and not build_objective(AlgoConfig(shrink=2)).replays_rollout
    random_mask = build_objective(AlgoConfig(preset="random_mask"))
    assert random_mask.planner == RandomMask() and not random_mask.replays_rollout
    rows = random_mask.plan(trajectory_of([1, 2, 3, 4], block_size=4), np.random.default_rng(0))
    assert len(rows) == 1 and (rows.masked == rows.scored).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "tracrl"}, "did you mean tracerl"),
        ({"advantage": "z-score"}, "did you mean zscore"),
        ({"kl_estimator": "k4"}, "known are k1, k2, k3"),
        ({"normalizer": "token-mean"}, "did you mean token_mean"),
        ({"normalizer": "row_sum"}, "algo.normalizer=row_sum"),
        ({"kl_normalizer": "rowsum"}, "did you mean row_sum"),
        ({"shrink": 0}, "at least 1"),
        ({"preset": "random_mask", "shrink": 8}, "merges no steps"),
        ({"ratio": "tokens"}, "did you mean token"),
        ({"kl_reference": "inital"}, "did you mean initial"),
        ({"score_by": "force"}, "did you mean forced"),
        ({"preset": "spg"}, "set algo.ratio=sequence"),
        ({"preset": "mdpo", "ratio": "sequence"}, "advantage of its own"),
        ({"clip_dual": -1.0}, "clip_dual"),
        ({"random_share": -1.0}, "random_share"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_high": float("nan")}, "clip_high"),
        ({"kl_coef": -1.0}, "kl_coef"),
    ],
)
def test_wrong_choices_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_objective(AlgoConfig(**changes))


def test_constant_normalizer_needs_the_budget():
    algo = AlgoConfig(normalizer="constant")
    trajectory, objective = trajectory_of([1, 2]), build_objective(algo)
    units = [objective.units(objective.plan(trajectory, np.random.default_rng(0)), trajectory)]
    with pytest.raises(ConfigError, match="max_tokens"):
        objective.weights(units, [2])
    assert build_objective(algo, max_tokens=8).weights(units, [2])[0][0] == pytest.approx([1 / 8] * 2)


def test_objectives_import_no_runtime():
    code = (
        "import sys, rlpipe.objectives.objective, rlpipe.objectives.gae; "
        "print(sorted({'ray', 'deepspeed', 'omegaconf', 'transformers', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
