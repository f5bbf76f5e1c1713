"""Specs, folders, the character tokenizer and weights on the move."""

import json

import numpy as np
import pytest
import torch
from tiny_models import ALPHABET, prompts, sample, tiny

from rlpipe.config import ModelConfig
from rlpipe.errors import ConfigError, ModelError, WeightMismatch
from rlpipe.models.loading import load_model, load_tokenizer, read_spec, save_model
from rlpipe.models.spec import DiffusionSpec
from rlpipe.models.tiny import build_tiny
from rlpipe.models.tokenizer import character_tokenizer
from rlpipe.models.weights import Manifest, checksum, fill_bucket, load_buckets, split_buckets


def test_characters_round_trip(tmp_path):
    text = "12_4\n(3 + 4)*2"
    tokenizer = character_tokenizer(text)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer("€")["input_ids"] == [tokenizer.unk_token_id]
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)(text)["input_ids"] == ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ("block", "full"))
def test_a_saved_model_is_the_same_model(kind, tmp_path):
    model, tokenizer = tiny(kind)
    save_model(model, tokenizer, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.spec == model.spec == read_spec(tmp_path)
    for (name, want), (_, got) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(want, got), name
    tokens = prompts(tokenizer, 3)
    for want, got in zip(sample(model, tokens)[0], sample(loaded, tokens)[0], strict=True):
        np.testing.assert_array_equal(want.response_ids, got.response_ids)
        np.testing.assert_array_equal(want.events.logp, got.events.logp)


def test_plain_transformers_reads_the_folder(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = tiny("full")
    save_model(model, tokenizer, tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == lm.config.diffusion["mask_token_id"]


def test_weights_do_not_touch_or_depend_on_the_global_generator():
    state = torch.get_rng_state()
    one, _ = build_tiny(ModelConfig(), ALPHABET, 5)
    torch.rand(3)
    two, _ = build_tiny(ModelConfig(), ALPHABET, 5)
    three, _ = build_tiny(ModelConfig(), ALPHABET, 6)
    assert torch.equal(one.lm.lm_head.weight, two.lm.lm_head.weight)
    assert not torch.equal(one.lm.lm_head.weight, three.lm.lm_head.weight)
    assert state.shape == torch.get_rng_state().shape


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"model.path=.*no config.json"):
        load_model(tmp_path / "nowhere")
    model, tokenizer = tiny("block")
    save_model(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spec = config.pop("diffusion")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no 'diffusion' entry"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"diffusion": spec | {"maskid": 3}}))
    with pytest.raises(ModelError, match="maskid"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"diffusion": spec, "num_hidden_layers": 5}))
    with pytest.raises(ModelError, match="contradicts itself"):
        load_model(tmp_path)
    more = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config | {"diffusion": spec} | more))
    with pytest.raises(ModelError, match="weights do not fit"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"attention": "causal"}, {"block_size": 0}, {"attention": "full"}, {"logit_shift": 1}, {"logit_shift": 2}],
)
def test_impossible_specs_are_refused(changes):
    with pytest.raises(ModelError):
        DiffusionSpec(mask_token_id=2, **changes)


@pytest.mark.parametrize(
    "entry", ["full", 3, {"mask_token_id": "2"}, {"mask_token_id": 2, "eos_token_ids": [1.5]}, {"mask_token_id": -1}, {}]
)
def test_entries_that_are_no_spec_are_refused(entry):
    with pytest.raises(ModelError, match="'diffusion' entry of config.json does not fit"):
        DiffusionSpec.from_dict(entry)


def test_unknown_tiny_models_are_refused():
    with pytest.raises(ConfigError, match="tiny:block"):
        build_tiny(ModelConfig(path="tiny:blok"), ALPHABET, 0)
    with pytest.raises(ConfigError, match="heads"):
        build_tiny(ModelConfig(width=30), ALPHABET, 0)


def packed(model, bucket_bytes: int, version: int = 3):
    named = list(model.lm.named_parameters())
    buckets, entries = [], []
    for number, indices in enumerate(split_buckets([p.nbytes for _, p in named], bucket_bytes)):
        bucket, part = fill_bucket([named[i] for i in indices], number)
        buckets.append(bucket)
        entries += part
    return Manifest(version, tuple(entries), checksum(buckets)), buckets


@pytest.mark.parametrize("bucket_bytes", (1, 10_000, 10**9))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_weights_arrive_to_the_bit_and_in_place(bucket_bytes, dtype):
    source, _ = build_tiny(ModelConfig(layers=1, width=32, heads=2, mlp=64), ALPHABET, 1)
    target, _ = build_tiny(ModelConfig(layers=1, width=32, heads=2, mlp=64), ALPHABET, 2)
    source, target = source.to(dtype), target.to(dtype)
    storage = target.lm.lm_head.weight.data_ptr()
    manifest, buckets = packed(source, bucket_bytes)
    load_buckets(target.lm, manifest, buckets)
    assert target.lm.lm_head.weight.data_ptr() == storage
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert manifest.nbytes == sum(p.nbytes for p in source.parameters())


def test_damaged_or_foreign_weights_are_refused_before_anything_changes():
    source, _ = build_tiny(ModelConfig(layers=1, width=32, heads=2, mlp=64), ALPHABET, 1)
    target, _ = build_tiny(ModelConfig(layers=1, width=32, heads=2, mlp=64), ALPHABET, 2)
    other, _ = build_tiny(ModelConfig(layers=2, width=32, heads=2, mlp=64), ALPHABET, 2)
    before = [p.detach().clone() for p in target.parameters()]
    manifest, buckets = packed(source, 10_000)
    buckets[0] = buckets[0].copy()
    buckets[0][7] ^= 1
    with pytest.raises(WeightMismatch, match="damaged"):
        load_buckets(target.lm, manifest, buckets)
    with pytest.raises(WeightMismatch, match="differ"):
        load_buckets(other.lm, *packed(source, 10_000))
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
