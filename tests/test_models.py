"""Specs, folders, the character tokenizer and weights on the move."""

import json

import numpy as np
import pytest
import torch
from tiny_models import ALPHABET, prompts, sample, tiny

from rlpipe.config import ModelConfig
from rlpipe.errors import ConfigError, ModelError
from rlpipe.models.loading import load_model, load_tokenizer, read_spec, save_model
from rlpipe.models.spec import DiffusionSpec
from rlpipe.models.tiny import build_tiny
from rlpipe.models.tokenizer import character_tokenizer


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
