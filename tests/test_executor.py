"""The sampler's forward is the stock forward, for every architecture it knows, and follows the weights."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from rlpipe.models import attention
from rlpipe.models.attention import DensePlan, SlotCache
from rlpipe.models.executor import Executor
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.spec import DiffusionSpec

ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def build(config_class, model_class, dtype=torch.float32):
    attention.register()
    extra = {"head_dim": 16} if config_class is not Qwen2Config else {}
    config = config_class(
        vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=1, **extra,
    )  # fmt: skip
    config._attn_implementation = attention.IMPLEMENTATION
    lm = model_class._from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.ndim == 1)).to(dtype)
    return DiffusionLM(lm, DiffusionSpec(mask_token_id=49, attention="full", block_size=0)).eval()


@torch.inference_mode()
def both(model):
    ids = torch.randint(0, 49, (1, 23), generator=torch.Generator().manual_seed(1))
    where = torch.randint(0, 200, (1, 23), generator=torch.Generator().manual_seed(2))
    plan = DensePlan(torch.rand(1, 23, 23, generator=torch.Generator().manual_seed(3)) < 0.7 + torch.eye(23))
    return model.hidden(ids, where, plan), Executor.of(model.lm).hidden(ids, where, plan)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_executor_is_the_stock_forward(name):
    model = build(*ARCHITECTURES[name])
    stock, ours = both(model)
    assert (stock - ours).abs().max() < 2e-5 * stock.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_that_are_copied_in_place_arrive_and_nothing_is_held_twice(name):
    model = build(*ARCHITECTURES[name])
    both(model)
    layer = model.lm.model.layers[1].self_attn
    storage = layer.q_proj.weight.untyped_storage().data_ptr()
    assert storage == layer.v_proj.weight.untyped_storage().data_ptr()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 1.1)
    stock, ours = both(model)
    assert (stock - ours).abs().max() < 2e-5 * stock.abs().max()
    assert layer.q_proj.weight.untyped_storage().data_ptr() == storage, "joined once"
    names = dict(model.lm.named_parameters())
    model.lm.load_state_dict({k: v.clone() * 0.9 for k, v in names.items()})
    stock, ours = both(model)
    assert (stock - ours).abs().max() < 2e-5 * stock.abs().max()


def test_the_last_layer_serves_only_the_rows_that_are_wanted():
    """The same hidden states, and every key and value is stored as before."""
    for name in ARCHITECTURES:
        model = build(*ARCHITECTURES[name])
        shape = {"slots": 3, "positions": 16, "layers": 3, "kv_heads": 2, "head_dim": 16 if name != "qwen2" else 12}
        slot = torch.tensor([0] * 8 + [1] * 4 + [2] * 9)
        store = torch.cat([torch.arange(8), torch.arange(4), torch.arange(9)])
        ids = torch.randint(0, 49, (1, 21), generator=torch.Generator().manual_seed(1))
        wanted = torch.tensor([2, 6, 7, 8, 17])
        found = []
        with torch.inference_mode():
            for asked in (None, wanted):
                cache = SlotCache(**shape, dtype=torch.float32, device="cpu")
                plan = cache.plan(slot, store, torch.full((21,), 9) - (slot == 1) * 5, 3, None, asked)
                found.append((Executor.of(model.lm).hidden(ids, store.unsqueeze(0), plan), cache.storage))
        torch.testing.assert_close(found[0][0][:, wanted], found[1][0], rtol=1e-4, atol=1e-4)
        for one, other in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_where_the_stock_model_rounds():
    model = build(*ARCHITECTURES["qwen3"], dtype=torch.bfloat16)
    stock, ours = both(model)
    assert (stock.float() - ours.float()).abs().mean() < 0.02 * stock.float().abs().mean()


def test_an_unknown_architecture_keeps_the_stock_forward():
    assert Executor.of(build(MistralConfig, MistralForCausalLM).lm) is None
