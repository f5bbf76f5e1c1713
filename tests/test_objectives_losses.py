"""Per-token losses: published numbers, identities at the first update, gradients."""

from __future__ import annotations

import pytest
import torch

from rlpipe.objectives.losses import KL_ESTIMATORS, clip_is_active, kl_penalty, policy_loss, value_loss

# log-probabilities of a published two-row example: its scored tokens, old log-probability -1.6 everywhere
LOGP = torch.tensor([-2.510818, -2.205913, -0.81259, -1.510818])
OLD = torch.full((4,), -1.6)
ADVANTAGE = torch.tensor([1.0, 1.0, -0.5, -0.5])
# a second fixture: two rows of three tokens, the last one not scored, token mean
NEW_F = torch.tensor([-0.7, -2.3, -0.5, -0.9, -1.0])
OLD_F = torch.tensor([-1.0, -2.0, -0.5, -0.3, -1.5])
ADVANTAGE_F = torch.tensor([1.0, 1.0, 1.0, -0.5, -0.5])


def test_policy_loss_reference():
    loss, ratio = policy_loss(LOGP, OLD, ADVANTAGE, 0.2, 0.2)
    assert float(loss.sum()) / 8 == pytest.approx(0.08721457, abs=1e-6)  # two rows, longest response 4
    assert ratio.tolist() == pytest.approx((LOGP - OLD).exp().tolist())
    loss, ratio = policy_loss(NEW_F, OLD_F, ADVANTAGE_F, 0.2, 0.2)
    assert float(loss.mean()) == pytest.approx(-0.343292, abs=1e-5)
    low, high = clip_is_active(ratio, ADVANTAGE_F, 0.2, 0.2)
    assert float((low | high).float().mean()) == pytest.approx(0.4)


@pytest.mark.parametrize(("kind", "expected"), [("k3", 0.08852562), ("k1", 0.0864144)])
def test_kl_reference(kind, expected):
    policy, _ = policy_loss(LOGP, OLD, ADVANTAGE, 0.2, 0.2)
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
    loss, ratio = policy_loss(logp, LOGP, ADVANTAGE, 0.2, 0.28)
    assert ratio.tolist() == [1.0] * 4
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx((-ADVANTAGE).tolist())


def test_gradient_stops_where_the_clip_is_active():
    old = torch.zeros(4)
    logp = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, ratio = policy_loss(logp, old, advantage, 0.2, 0.2)
    loss.sum().backward()
    low, high = clip_is_active(ratio, advantage, 0.2, 0.2)
    assert low.tolist() == [False, False, False, True] and high.tolist() == [True, False, False, False]
    assert (logp.grad == 0).tolist() == (low | high).tolist()


def test_asymmetric_clip():
    logp, old = torch.log(torch.tensor([1.25, 0.75])), torch.zeros(2)
    loss, _ = policy_loss(logp, old, torch.tensor([1.0, -1.0]), 0.2, 0.28)
    assert loss.tolist() == pytest.approx([-1.25, 0.8])


def test_the_bound_keeps_far_ratios_finite():
    logp = torch.tensor([200.0, -200.0], requires_grad=True)
    loss, ratio = policy_loss(logp, torch.zeros(2), torch.tensor([-1.0, 1.0]), 0.2, 0.2)
    assert ratio.tolist() == pytest.approx([torch.tensor(10.0).exp().item(), torch.tensor(-10.0).exp().item()])
    loss.sum().backward()
    assert logp.grad.tolist() == [0.0, 0.0]
    assert torch.isfinite(kl_penalty(logp, torch.zeros(2), "k3")).all()


def test_half_precision_is_lifted():
    loss, ratio = policy_loss(LOGP.bfloat16(), OLD.bfloat16(), ADVANTAGE.bfloat16(), 0.2, 0.2)
    assert loss.dtype == ratio.dtype == torch.float32
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
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantage, 0.2, 0.28)[0], (logp,))
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, old, kind), (logp,))
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, advantage, 0.2), (logp,))
