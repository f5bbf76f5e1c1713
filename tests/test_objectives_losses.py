"""Per-token losses: published numbers, identities at the first update, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlpipe.config import AlgoConfig
from rlpipe.objective_presets import algo_settings
from rlpipe.objectives.entries import Entries
from rlpipe.objectives.losses import (
    KL_ESTIMATORS,
    Clip,
    clip_is_active,
    kl_penalty,
    likelihood_loss,
    policy_loss,
    ratio_of,
    value_loss,
)
from rlpipe.objectives.objective import build_objective
from rlpipe.objectives.reducers import unit_weights
from rlpipe.objectives.rows import Rows
from rlpipe.objectives.units import join

# log-probabilities of a published two-row example: its scored tokens, old log-probability -1.6 everywhere
LOGP = torch.tensor([-2.510818, -2.205913, -0.81259, -1.510818])
OLD = torch.full((4,), -1.6)
ADVANTAGE = torch.tensor([1.0, 1.0, -0.5, -0.5])
# a second fixture: two rows of three tokens, the last one not scored, token mean
NEW_F = torch.tensor([-0.7, -2.3, -0.5, -0.9, -1.0])
OLD_F = torch.tensor([-1.0, -2.0, -0.5, -0.3, -1.5])
ADVANTAGE_F = torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5])
CLIP = Clip(0.2, 0.2)


def test_policy_loss_reference():
    loss = policy_loss(LOGP, OLD, ADVANTAGE, CLIP)
    assert float(loss.sum()) / 8 == pytest.approx(0.08721457, abs=1e-6)  # two rows, longest response 4
    assert ratio_of(LOGP, OLD).tolist() == pytest.approx((LOGP - OLD).exp().tolist())
    for clip in (CLIP, Clip(0.2, 0.2, dual=3.0)):  # published with the dual clip at 3, which nothing here reaches
        assert float(policy_loss(NEW_F, OLD_F, ADVANTAGE_F, clip).mean()) == pytest.approx(-0.343292, abs=1e-5)
    low, high = clip_is_active(NEW_F, OLD_F, ADVANTAGE_F, CLIP)
    assert float((low | high).float().mean()) == pytest.approx(0.4)


@pytest.mark.parametrize(("kind", "expected"), [("k3", 0.08852562), ("k1", 0.0864144)])
def test_kl_reference(kind, expected):
    policy = policy_loss(LOGP, OLD, ADVANTAGE, CLIP)
    total = (policy + 0.01 * kl_penalty(LOGP, OLD, kind)).sum() / 8
    assert float(total) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_kl_is_zero_without_movement(kind):
    logp = LOGP.clone().requires_grad_()
    kl = kl_penalty(logp, LOGP, kind)
    assert kl.tolist() == [0.0] * 4
    (gradient,) = torch.autograd.grad(kl.sum(), logp)
    assert gradient.tolist() == ([1.0] * 4 if kind == "k1" else [0.0] * 4)


def test_kl_signs():
    d = torch.tensor([-0.5, 0.3])
    zero = torch.zeros(2)
    assert kl_penalty(d, zero, "k1").tolist() == pytest.approx(d.tolist())
    assert kl_penalty(d, zero, "k2").tolist() == pytest.approx((d**2 / 2).tolist())
    assert kl_penalty(d, zero, "k3").tolist() == pytest.approx(((-d).exp() - 1 + d).tolist())
    assert (kl_penalty(d, zero, "k3") > 0).all()
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(d, zero, "k4")


def test_first_update_is_the_plain_policy_gradient():
    logp = LOGP.clone().requires_grad_()
    loss = policy_loss(logp, LOGP, ADVANTAGE, Clip(0.2, 0.28))
    assert ratio_of(logp, LOGP).tolist() == [1.0] * 4
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx((-ADVANTAGE).tolist())


def test_gradient_stops_where_the_clip_is_active():
    old = torch.zeros(4)
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss = policy_loss(logp, old, advantage, CLIP)
    loss.sum().backward()
    low, high = clip_is_active(logp, old, advantage, CLIP)
    assert low.tolist() == [False, False, False, True] and high.tolist() == [True, False, False, False]
    assert (logp.grad == 0).tolist() == (low | high).tolist()


def test_asymmetric_clip():
    logp, old = torch.log(torch.tensor([1.25, 0.75])), torch.zeros(2)
    loss = policy_loss(logp, old, torch.tensor([1.0, -1.0]), Clip(0.2, 0.28))
    assert loss.tolist() == pytest.approx([-1.25, 0.8])


def test_the_bound_keeps_far_ratios_finite():
    logp = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = policy_loss(logp, torch.zeros(2), torch.tensor([-1.0, 1.0]), CLIP)
    assert ratio_of(logp, torch.zeros(2)).tolist() == pytest.approx(
        [torch.tensor(10.0).exp().item(), torch.tensor(-10.0).exp().item()]
    )
    loss.sum().backward()
    assert logp.grad.tolist() == [0.0, 0.0]
    assert torch.isfinite(kl_penalty(logp, torch.zeros(2), "k3")).all()


def test_half_precision_is_lifted():
    loss = policy_loss(LOGP.bfloat16(), OLD.bfloat16(), ADVANTAGE.bfloat16(), CLIP)
    assert loss.dtype == ratio_of(LOGP.bfloat16(), OLD).dtype == torch.float32
    assert kl_penalty(LOGP.bfloat16(), OLD, "k3").dtype == torch.float32


def test_value_loss():
    value, old, returns = torch.tensor([0.5, 0.1, 1.5]), torch.zeros(3), torch.ones(3)
    got = value_loss(value, old, returns, 0.2)
    assert got.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2, 0.5 * 0.8**2])


@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_gradients_equal_finite_differences(kind):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20, generator=generator, dtype=torch.float64)  # noqa: E731
    logp, old, advantage = (0.4 * draw()).requires_grad_(), 0.4 * draw(), draw()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantage, Clip(0.2, 0.28)), (logp,))
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, old, kind), (logp,))
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, advantage, 0.2), (logp,))


def fixture_f(objective, *, rows=(), kl=None) -> float:
    """Loss of two responses of 3 and 2 tokens, one row each, with the fixture's numbers; rows: fields of each one's Rows."""
    lengths, own = (3, 2), rows or ({}, {})
    parts = [plain_rows(length, **fields) for length, fields in zip(lengths, own, strict=True)]
    units = [join(part, objective.algo.ratio, np.zeros(part.response_len, np.int64)) for part in parts]
    policy, kl_weight = (torch.from_numpy(np.concatenate(w)) for w in objective.weights(units, lengths))
    starts = np.cumsum([0, len(units[0])])
    credit = [np.full(len(u), a) if u.credit is None else u.credit for u, a in zip(units, (1.0, -0.5), strict=True)]
    entries = Entries(
        unit=torch.from_numpy(np.concatenate([u.entry + s for u, s in zip(units, starts, strict=True)])).long(),
        coefficient=torch.from_numpy(np.concatenate([u.coefficient for u in units])),
        advantage=torch.from_numpy(np.concatenate(credit)).float(),
        policy_weight=policy,
        kl_weight=kl_weight,
        position=torch.arange(5),
    )
    return float(objective.loss(NEW_F, OLD_F, entries, ref_logp=kl).loss)


def plain_rows(length: int, **fields) -> Rows:
    return Rows(masked=np.ones((1, length), bool), scored=np.ones((1, length), bool), step=np.zeros(1, np.int32), **fields)


def test_sequence_ratio_reference():
    """Published: the mean of a response's log-ratios, clipped as one, the mean over responses."""
    algo = AlgoConfig(**algo_settings("espo") | {"kl_coef": 0.0})
    assert fixture_f(build_objective(algo)) == pytest.approx(-0.262193, abs=1e-6)
    whole = policy_loss(torch.tensor([-3.7, -3.4]), torch.tensor([-4.0, -3.0]), torch.tensor([1.0, -0.5]), CLIP)
    assert float(whole.mean()) == pytest.approx(-0.4), "one bound a response, joined beforehand"


def test_sequence_kl_reference():
    """Published for bounds E of 256 tokens: k2(E - E_ref) / 256. Our units are per token, hence the weight; k3 takes E."""
    bound, reference = torch.tensor([-40.0, -30.0]), torch.tensor([-41.0, -28.0])
    weight = unit_weights(
        [join(plain_rows(256), "sequence", np.zeros(256, np.int64)) for _ in range(2)],
        normalizer="length_sum",
        response_lens=[256, 256],
    )
    assert [float(w[0]) for w in weight] == [128.0, 128.0], "the length over two responses"
    per_response = 256 * kl_penalty(bound / 256, reference / 256, "k2")
    assert per_response.tolist() == pytest.approx([0.001953, 0.007812], abs=1e-6)
    assert (kl_penalty(bound, reference, "k3") / 256).tolist() == pytest.approx([0.001437, 0.017145], abs=1e-6)


def test_length_weighted_bounds_reference():
    """Published for bounds -1.2 and -0.8 of the fixture's responses: -A · bound · length / total length."""
    units = [join(plain_rows(length), "sequence", np.zeros(length, np.int64)) for length in (3, 2)]
    weight = np.concatenate(unit_weights(units, normalizer="length_mean", response_lens=[3, 2]))
    bound, advantage = torch.tensor([-1.2, -0.8]), torch.tensor([1.0, -0.5])
    loss = likelihood_loss(bound, bound, advantage, CLIP)
    assert float((torch.from_numpy(weight) * loss).sum()) == pytest.approx(0.56)


@pytest.mark.parametrize(("kl_coef", "expected"), [(0.0, -0.193419), (0.02, -0.192409)])
def test_step_credit_loss_reference(kl_coef, expected):
    """Published for confidences .9 .4 .7 and .2 .8, advantages scaled by L / masks, reference old - .1, token mean."""
    algo = AlgoConfig(**algo_settings("mdpo") | {"normalizer": "token_mean", "kl_coef": kl_coef})
    rows = [
        {"weight": np.array([[0.9, 0.4, 0.7]], np.float32), "credit": np.array([3 / 3], np.float32)},
        {"weight": np.array([[0.2, 0.8]], np.float32), "credit": np.array([-0.5 * 3 / 2], np.float32)},
    ]
    assert fixture_f(build_objective(algo), rows=rows, kl=OLD_F - 0.1) == pytest.approx(expected, abs=1e-6)


def test_the_dual_clip_bounds_the_loss_of_negative_advantages():
    old, advantage = torch.zeros(3), torch.tensor([-0.5, -0.5, 2.0])
    logp = torch.tensor([5.0, 2.0, 5.0]).log().requires_grad_()
    clip = Clip(0.2, 0.2, dual=3.0)
    loss = policy_loss(logp, old, advantage, clip)
    assert loss.tolist() == pytest.approx([1.5, 1.0, -2.4]), (
        "at most 3 · 0.5; untouched below; a positive one is not its matter"
    )
    assert policy_loss(logp, old, advantage, CLIP)[0].item() == pytest.approx(2.5)
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0.0, 1.0, 0.0])
    low, high = clip_is_active(logp, old, advantage, clip)
    assert not low.any() and high.tolist() == [True, False, True]


def test_dynamic_bounds_are_wide_where_probability_was_small():
    """The bounds solve (r - 1)·r·q = ±epsilon, the published condition; at q = 1 they are near the fixed ones."""
    q = torch.tensor([1.0, 0.8, 0.5, 0.05, 1e-30], dtype=torch.float64)
    clip = Clip(0.16, 0.2, dynamic=True)
    lower, upper = clip.bounds(q.log())
    solved = q * 4 * 0.16 <= q**2
    assert ((lower**2 - lower) * q)[solved].tolist() == pytest.approx([-0.16] * int(solved.sum()))
    assert lower[~solved].tolist() == [0.5] * int((~solved).sum())
    assert ((upper**2 - upper) * q)[:4].tolist() == pytest.approx([0.2] * 4) and upper[4] == 10.0
    assert (lower.diff() <= 0).all() and (upper.diff() >= 0).all()
    ratio = torch.tensor([1.3, 0.45], dtype=torch.float64)
    old = torch.tensor([0.05, 0.05], dtype=torch.float64).log()
    loss = policy_loss(old + ratio.log(), old, torch.tensor([1.0, -1.0]), clip)
    assert loss.tolist() == pytest.approx([-1.3, 0.5]), "1.3 passes where the fixed bound would clip it at 1.2"
    assert all(value.isfinite().all() for value in Clip(0.0, 0.0, dynamic=True).bounds(torch.tensor([-1000.0, 0.0])))
