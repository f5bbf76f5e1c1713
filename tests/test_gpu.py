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
