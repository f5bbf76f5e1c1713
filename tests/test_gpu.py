"""The same model, sampler and packing on a GPU. Run with `-m gpu`."""

import copy

import numpy as np
import pytest
import torch
from test_packing import replay
from tiny_models import prompts, sample, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("kind", ("block", "full"))
def test_sampling_on_the_gpu_equals_the_cpu(kind):
    model, tokenizer = tiny(kind)
    tokens = prompts(tokenizer, 16)
    here, _ = sample(model, tokens, max_tokens=12)
    there, _ = sample(copy.deepcopy(model).cuda(), tokens, max_tokens=12)
    same = 0
    for a, b in zip(here, there, strict=True):
        if np.array_equal(a.response_ids, b.response_ids) and np.array_equal(a.events.position, b.events.position):
            same += 1
            np.testing.assert_allclose(a.events.logp, b.events.logp, atol=1e-4)
    assert same >= 14, "rounding may move a draw across a boundary now and then, not often"


@pytest.mark.parametrize("kind", ("block", "full"))
def test_replay_on_the_gpu_reproduces_its_own_rollout(kind):
    model, tokenizer = tiny(kind)
    model = copy.deepcopy(model).cuda()
    records, _ = sample(model, prompts(tokenizer, 10), max_tokens=14)
    assert replay(model, records, 4).max() <= 1e-4


def test_flex_attention_equals_the_cpu_forward_and_backward():
    from test_packing import random_pack

    from rlpipe.models.packed_attention import FlexPlan, dense_plan

    for seed, heads in ((0, (4, 4)), (1, (4, 2)), (2, (4, 4))):
        batch = random_pack(np.random.default_rng(seed), 4 if seed < 2 else 0)
        generator = torch.Generator().manual_seed(seed)
        length = len(batch.tags.copy)
        inputs = [torch.randn(1, n, length, 64, generator=generator).cuda().requires_grad_() for n in (*heads, heads[1])]
        tags = batch.tags.map(lambda t: t.cuda())
        weight = torch.randn(1, length, 4, 64, generator=generator).cuda()
        found = []
        for plan in (FlexPlan(tags), dense_plan(tags)):
            out = plan.attend(0, *inputs, 0.125)
            found.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
        for mine, dense in zip(*found, strict=True):
            torch.testing.assert_close(mine, dense, rtol=2e-3, atol=2e-3)  # float32 products may use TF32 inside the kernel


@pytest.mark.parametrize("kind", ("block", "full"))
def test_a_packed_step_on_the_gpu_equals_the_cpu(kind):
    from test_learner_samples import step_plan

    from rlpipe.learner.batches import Batches

    plan, _ = step_plan(kind)
    gradients = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(tiny(kind)[0]).to(device)
        batches = Batches(plan.samples, model.spec, torch.device(device))
        held = batches.packed(range(len(plan.samples)))
        logp, _ = model(held.input_ids, held.position_ids, held.plan(), held.index, held.targets)
        logp.sum().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2 * float(gradients[0].abs().max()))
