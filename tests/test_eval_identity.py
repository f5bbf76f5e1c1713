"""What identifies an evaluation: the weights' bytes and not how they are filed."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny

from rlpipe.errors import ModelError
from rlpipe.eval.identity import content_hash, prompts_hash, tokenizer_hash, weights_hash
from rlpipe.models.loading import save_model
from rlpipe.trajectory import Prompt


@pytest.fixture
def tensors():
    rng = torch.Generator().manual_seed(1)
    return {
        "b": torch.randn(3, 5, generator=rng),
        "a": torch.randn(7, generator=rng).bfloat16(),
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
    }


def saved(folder, tensors, shards=1):
    folder.mkdir()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return weights_hash(folder)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[shard::shards]}
        save_file(mine, folder / file)
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf8")
    return weights_hash(folder)


def test_it_is_blake2b_over_names_dtypes_shapes_and_bytes(tmp_path, tensors):
    digest = hashlib.blake2b(digest_size=16)
    for name, dtype in (("a", "BF16"), ("b", "F32"), ("empty", "F32"), ("scalar", "F32")):
        digest.update(json.dumps([name, dtype, list(tensors[name].shape)]).encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    found = saved(tmp_path / "one", tensors)
    assert found == {"blake2b": digest.hexdigest(), "tensors": 4, "parameters": 3 * 5 + 7 + 1}


def test_files_and_their_order_do_not_matter_but_every_bit_does(tmp_path, tensors):
    one = saved(tmp_path / "one", tensors)
    assert saved(tmp_path / "two", dict(reversed(tensors.items())), shards=3) == one
    flipped = tensors["b"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    for number, change in enumerate(({"b": flipped}, {"b": tensors["b"].reshape(5, 3)}, {"c": torch.zeros(1)})):
        assert saved(tmp_path / f"changed{number}", tensors | change)["blake2b"] != one["blake2b"]
    renamed = {("z" if name == "b" else name): tensor for name, tensor in tensors.items()}
    assert saved(tmp_path / "renamed", renamed)["blake2b"] != one["blake2b"]


def test_a_model_that_was_saved_twice_is_one(tmp_path):
    for name in ("one", "two"):
        save_model(*tiny("block"), tmp_path / name)
    assert weights_hash(tmp_path / "one") == weights_hash(tmp_path / "two")
    assert tokenizer_hash(tmp_path / "one") == tokenizer_hash(tmp_path / "two")
    file = tmp_path / "two" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf8").replace("<eos>", "<end>"), encoding="utf8")
    assert tokenizer_hash(tmp_path / "one") != tokenizer_hash(tmp_path / "two")


def test_damaged_weights_are_named(tmp_path, tensors):
    saved(tmp_path / "one", tensors)
    file = tmp_path / "one" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ModelError, match="truncated"):
        weights_hash(tmp_path / "one")


def test_prompts_and_settings_count_with_all_they_say():
    one = Prompt(uid="a", task="t", text="x\ud800", answer={"b": 1, "a": [2]})
    same = Prompt(uid="a", task="t", text="x\ud800", answer={"a": [2], "b": 1})
    other = Prompt(uid="a", task="t", text="x\ud800", answer={"a": [3], "b": 1})
    assert prompts_hash([one]) == prompts_hash([same]) != prompts_hash([other])
    assert prompts_hash([one, other]) != prompts_hash([other, one])
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1}) != content_hash({"a": 1, "b": [2, 1]})
