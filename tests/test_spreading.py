"""A model over several devices: how layers are dealt out, and that nothing meets a tensor of another device.

Two GPUs are needed for the last test alone; the others do with a CPU and tensors without contents.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from tiny_models import prompts, sample, tiny

from rlpipe.errors import ModelError
from rlpipe.models.attention import SlotCache
from rlpipe.models.executor import Executor
from rlpipe.models.spreading import split_layers, spread


def fullest(sizes, places, outside: int, devices: int) -> int:
    return max(sum(s for s, p in zip(sizes, places, strict=True) if p == d) + outside * (d == 0) for d in range(devices))


@pytest.mark.parametrize("outside, devices", [(0, 2), (7, 2), (3, 3), (40, 3), (1, 6)])
def test_the_fullest_device_has_as_little_as_possible(outside, devices):
    sizes = [5, 3, 8, 2, 6, 4]
    found = split_layers(sizes, outside, devices)
    assert found == sorted(found) and max(found) < devices
    cuts = itertools.combinations_with_replacement(range(len(sizes) + 1), devices - 1)
    best = min(fullest(sizes, [sum(i >= cut for cut in cuts_) for i in range(len(sizes))], outside, devices) for cuts_ in cuts)
    assert fullest(sizes, found, outside, devices) == best


def test_what_cannot_be_spread_is_refused():
    model = copy.deepcopy(tiny("block")[0])
    with pytest.raises(ModelError, match="2 layers cannot be spread over 3"):
        spread(model, [torch.device("cpu")] * 3)
    model.lm.config.hidden_act = "gelu"
    with pytest.raises(ModelError, match="rollout.gpus=1"):
        spread(model, [torch.device("cpu")] * 2)


@pytest.mark.parametrize("kind", ("block", "full"))
def test_a_spread_model_samples_the_same(kind):
    model, tokenizer = tiny(kind)
    twin = spread(copy.deepcopy(model), [torch.device("cpu")] * 2)
    tokens = prompts(tokenizer, 4)
    for one, other in zip(*(sample(m, tokens, max_tokens=10, slots=2)[0] for m in (model, twin)), strict=True):
        assert np.array_equal(one.response_ids, other.response_ids) and np.array_equal(one.events.logp, other.events.logp)


@pytest.mark.parametrize("wanted", (False, True))
def test_every_layer_meets_only_its_own_device(wanted, monkeypatch):
    """The second device is `meta`: shapes without contents, which do not mix with what lies on the CPU."""
    model = copy.deepcopy(tiny("block")[0])
    config, home, other = model.lm.config, torch.device("cpu"), torch.device("meta")
    back, real_to = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        if tensor.device == other and args[0] == home:  # there is nothing to bring back but a shape
            back.append(tensor.shape)
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return real_to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    spread(model, [home, other])
    assert {p.device for p in model.lm.model.layers[1].parameters()} == {other}
    assert {p.device for name, p in model.lm.named_parameters() if "layers.1." not in name} == {home}
    rows = torch.arange(6)
    cache = SlotCache(
        slots=2, positions=8, layers=2, kv_heads=config.num_key_value_heads, dtype=torch.float32, device=home,
        head_dim=config.hidden_size // config.num_attention_heads,
    )  # fmt: skip
    plan = cache.plan(rows // 3, rows % 3, rows % 3 + 1, 2, wanted=torch.tensor([1, 4]) if wanted else None)
    executor = Executor(model.lm)
    with torch.inference_mode():
        hidden = executor.hidden(torch.ones(1, 6, dtype=torch.int64), (rows % 3)[None], plan)
    assert hidden.device == home and back == [hidden.shape] == [(1, 2 if wanted else 6, config.hidden_size)]
    assert [store.device for store in cache.storage] == [home] * 2 + [other] * 2
    assert [store.device for store in (*cache.keys, *cache.values)] == [home, other] * 2
    assert float(cache.keys[0][:, :3].abs().min()) > 0, "the first layer's were written here"
    slots = torch.tensor([1, 0])
    with torch.inference_mode():
        cache.copy_prefix(slots[:1], slots[1:], 3)
        cache.keep(slots)
    assert torch.equal(cache.keys[0][0], cache.keys[0][1]) and cache.keys[1].device == other
    assert plan.where.device == home, "the plan itself stays where it is"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_sample_as_one():
    model, tokenizer = tiny("block")
    one = copy.deepcopy(model).cuda()
    two = spread(copy.deepcopy(model), [torch.device("cuda", 0), torch.device("cuda", 1)])
    tokens = prompts(tokenizer, 4)
    for a, b in zip(*(sample(m, tokens, max_tokens=10, slots=2)[0] for m in (one, two)), strict=True):
        assert np.array_equal(a.response_ids, b.response_ids)
        assert np.allclose(a.events.logp, b.events.logp, atol=1e-5)
