"""Value models of families: they go out and in like the policy, and read the policy's tokens."""

import json

import pytest
import torch
from plain_architectures import LLADA
from safetensors.torch import load_file, save_file
from test_families import write

from rlpipe.errors import ModelError
from rlpipe.models.checkpoint_files import SINGLE
from rlpipe.models.families import FAMILIES
from rlpipe.models.loading import check_same_tokens, load_model, load_tokenizer, save_model
from rlpipe.models.tokenizer import character_tokenizer
from rlpipe.models.value import HEAD_FILE, ValueModel


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def llada(tmp_path):
    folder = tmp_path / "llada"
    folder.mkdir()
    return write(folder, LLADA)


def test_a_value_model_goes_out_and_in_as_its_family(llada, tmp_path):
    value = ValueModel(load_model(llada))
    torch.nn.init.ones_(value.head.weight)
    save_model(value, load_tokenizer(llada), tmp_path / "out")
    save_file(value.head.state_dict(), tmp_path / "out" / HEAD_FILE)
    again = ValueModel(load_model(tmp_path / "out"))
    again.load_head(again.provenance.folder)
    assert again.provenance.family is FAMILIES["llada"] and torch.equal(again.head.weight, value.head.weight)
    saved, published = (load_file(folder / SINGLE) for folder in (tmp_path / "out", llada))
    assert saved.keys() == published.keys() and all(torch.equal(saved[name], published[name]) for name in saved)


def test_a_value_model_must_have_the_policys_tokens(llada, tmp_path):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", LLADA)
    check_same_tokens(llada, other)
    for path in other.glob("*token*"):
        path.unlink()
    change(other / "config.json", mask_token_id=9)
    with pytest.raises(ModelError, match="the two must have the same tokens"):
        check_same_tokens(llada, other)
    character_tokenizer("xyz").save_pretrained(other)
    change(other / "config.json", mask_token_id=2)
    with pytest.raises(ModelError, match="another vocabulary"):
        check_same_tokens(llada, other)
