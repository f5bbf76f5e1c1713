"""Folders and hub ids in and out: what loads, what goes back unchanged, and what is refused with which words."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from plain_architectures import LLADA, LLADA_TIED, PLAIN, SDAR
from safetensors.torch import load_file, save_file
from test_families import write
from tiny_models import tiny

from rlpipe.errors import ModelError
from rlpipe.models import hub
from rlpipe.models.checkpoint_files import INDEX, SINGLE, WeightFiles
from rlpipe.models.export import ShardWriter
from rlpipe.models.families import FAMILIES
from rlpipe.models.filling import stock_tensors
from rlpipe.models.loading import check_model, load_model, load_tokenizer, read_spec, save_model
from rlpipe.models.tokenizer import character_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HEAD = "model.transformer.ff_out.weight"
TRAP = "raise SystemExit('code of a model was executed')\n"


@pytest.fixture
def llada(tmp_path):
    folder = tmp_path / "llada"
    folder.mkdir()
    return write(folder, LLADA)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The folder's weights in three files with an index."""
    (folder / SINGLE).unlink()
    where = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def refused(folder, **settings) -> str:
    with pytest.raises(ModelError) as error:
        load_model(folder, **settings)
    return str(error.value)


def test_shards_and_one_file_are_the_same_model(llada, tmp_path):
    copy = sharded(shutil.copytree(llada, tmp_path / "shards"), LLADA.tensors())
    one, many = load_model(llada), load_model(copy)
    for (name, want), (_, got) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        assert torch.equal(want, got), name
    with WeightFiles(copy) as files:
        assert files.parameters == sum(p.numel() for p in one.parameters())
        assert len(files.files) == 3 and files.dtypes == {"F32": files.parameters}
        assert files.nbytes == sum(path.stat().st_size for path in copy.glob("*.safetensors"))


def test_any_dtype_and_frequencies_that_no_dtype_touches(llada):
    plain, half = load_model(llada).lm, load_model(llada, "bfloat16").lm
    for (name, want), (_, got) in zip(plain.named_parameters(), half.named_parameters(), strict=True):
        assert torch.equal(want.to(torch.bfloat16), got), name
    fresh = type(plain)(plain.config).model.rotary_emb
    for lm in (plain, half):
        for name, buffer in fresh.named_buffers():
            found = lm.model.rotary_emb.get_buffer(name)
            assert found.dtype == torch.float32 and torch.equal(found, buffer), name
    assert not half.training and all(p.requires_grad for p in half.parameters())


@pytest.mark.parametrize("key", ("sdar", "llada2"))
def test_reading_holds_one_parameter_at_a_time(tmp_path, key, monkeypatch):
    folder = write(tmp_path, PLAIN[key])
    largest = max(t.nbytes for t in stock_tensors(load_model(folder).lm).values())
    alive, peak, read = {}, [0], WeightFiles.read

    def watched(self, name):
        tensor = read(self, name).clone()
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        peak[0] = max(peak[0], sum(alive.values()))
        return tensor

    monkeypatch.setattr(WeightFiles, "read", watched)
    load_model(folder)
    assert 0 < peak[0] <= 2 * largest < sum(t.nbytes for t in PLAIN[key].tensors().values()) / 2


def test_what_stood_beside_the_weights_goes_along_and_is_never_run(llada, tmp_path):
    for name in ("modeling_llada.py", "configuration_llada.py", "tokenization_llada.py"):
        (llada / name).write_text(TRAP)
    (llada / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (llada / "generation_config.json").write_text('{"eos_token_id": [1, 5],\n "made_by": "hand"}')
    change(llada / "config.json", auto_map={"AutoConfig": "configuration_llada.X", "AutoModel": "modeling_llada.Y"})
    change(llada / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_llada.Z", None]})
    model, tokenizer = load_model(llada), load_tokenizer(llada)
    assert model.spec.eos_token_ids == (1, 5)
    save_model(model, tokenizer, tmp_path / "out")
    same = {path.name for path in llada.iterdir()} - {"config.json", SINGLE}
    assert len(same) >= 7
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (llada / name).read_bytes(), name
    said, published = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", llada))
    assert said.pop("diffusion") == model.spec.to_dict() and said == published
    again = load_model(tmp_path / "out")
    assert again.spec == model.spec and again.provenance.family is FAMILIES["llada"]
    save_model(again, load_tokenizer(tmp_path / "out"), tmp_path / "twice")
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_tokenizer_without_a_stock_class_or_file_of_its_own(tmp_path):
    """Dream's: a class in a Python file, vocab.json and merges.txt."""
    letters = {token: i for i, token in enumerate(["a", "b", "c", "ab", "<|endoftext|>", "<|mask|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenization_dream.py").write_text(TRAP)
    said = {"tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    said |= {"eos_token": "<|endoftext|>", "mask_token": "<|mask|>", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("abc<|mask|>")["input_ids"] == [3, 2, 5] and tokenizer.mask_token_id == 5


def test_a_tied_head_that_is_saved_twice(tmp_path):
    folder, tensors = write(tmp_path, LLADA_TIED), LLADA_TIED.tensors()
    embedding = tensors["model.transformer.wte.weight"]
    save_file(tensors | {HEAD: embedding.clone()}, folder / SINGLE)
    model = load_model(folder)
    assert model.lm.lm_head.weight is model.lm.model.embed_tokens.weight
    save_model(model, load_tokenizer(folder), tmp_path / "out")
    saved = load_file(tmp_path / "out" / SINGLE)
    assert saved.keys() == {*tensors, HEAD} and torch.equal(saved[HEAD], embedding)
    save_file(tensors | {HEAD: embedding + 1}, folder / SINGLE)
    assert f"{HEAD} differs from the input embedding" in refused(folder)
    with pytest.raises(ModelError, match="differs from the input embedding"):
        check_model(folder)


def test_buffers_of_old_versions_are_ignored(tmp_path):
    folder = write(tmp_path, SDAR)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(SDAR.tensors() | old, folder / SINGLE)
    assert "rotary" not in " ".join(name for name, _ in load_model(folder).named_parameters())


@pytest.mark.parametrize(
    "settings, spec",
    [
        ({"block_size": 8}, ("block", 8, 2)),
        ({"mask_token_id": 7}, ("block", 4, 7)),
        ({"attention": "full"}, ("full", 0, 2)),
        ({}, ("block", 4, 2)),
    ],
)
def test_a_recipe_may_say_how_the_model_denoises(tmp_path, settings, spec):
    (tmp_path / "in").mkdir()
    folder = write(tmp_path / "in", SDAR)
    model = load_model(folder, **settings)
    save_model(model, load_tokenizer(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (model.spec.attention, model.spec.block_size, model.spec.mask_token_id) == spec
    assert config["mask_token_id"] == spec[2] and config["block_size"] == (spec[1] or 4)
    if spec[2] == 2:  # else the tokenizer disagrees, and the exported folder is asked the same question
        assert read_spec(tmp_path / "out") == model.spec
    assert read_spec(tmp_path / "out", mask_token_id=spec[2]) == model.spec


def test_a_model_with_full_attention_can_be_given_a_grid(llada):
    assert "model.attention=block" in refused(llada, block_size=4)
    assert "say which with model.block_size" in refused(llada, attention="block")
    spec = read_spec(llada, attention="block", block_size=4)
    assert (spec.attention, spec.block_size) == ("block", 4)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def header(folder: Path, entries: dict) -> None:
    raw = json.dumps(entries).encode()
    (folder / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 4)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda f: cut(f / SINGLE, -7), ["bytes and its header declares", "truncated", "Fetch it again"]),
        (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"x"), ["longer than it should be"]),
        (lambda f: cut(f / SINGLE, 100), ["truncated one", "it declares a header of"]),
        (lambda f: (f / SINGLE).write_bytes(b""), ["no safetensors file"]),
        (lambda f: (f / SINGLE).write_bytes(b"\x08" + b"\0" * 7 + b"notjson!"), ["its header is damaged"]),
        (lambda f: (f / SINGLE).unlink(), ["no weights", SINGLE, INDEX]),
        (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "only safetensors", "torch.load"]),
        (lambda f: (f / SINGLE).rename(f / "model-00001-of-00002.safetensors"), ["no model.safetensors.index.json"]),
        (lambda f: (f / INDEX).write_text("{"), [INDEX, "damaged"]),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x.safetensors"}}'), ["1 of 1 weight files are missing"]),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "model.safetensors"}}'), ["that a is in model.safetensors"]),
        (lambda f: (f / "config.json").write_text("[]"), ["a JSON object is expected there, and this is a list"]),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), ["tokenizer_config.json:1: not JSON"]),
        (lambda f: (f / "generation_config.json").write_text("{"), ["generation_config.json:1: not JSON"]),
        (lambda f: (f / "generation_config.json").write_text("[1]"), ["generation_config.json", "a JSON object is expected"]),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), ["tokenizer_config.json", "a JSON object is expected"]),
        (lambda f: (f / "config.json").write_bytes(b"\xff{}"), ["config.json", "not UTF-8"]),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 3}}'), [INDEX, "damaged"]),
        (lambda f: header(f, {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}), ["its header is damaged"]),
        (lambda f: header(f, {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}), ["its header is damaged"]),
        (lambda f: header(f, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}), ["its header is damaged"]),
    ],
)
def test_damaged_folders_are_named(llada, harm, words):
    harm(llada)
    message = refused(llada)
    for word in (*words, str(llada)):
        assert word in message, message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({HEAD: None}, ["1 missing", HEAD]),
        ({"model.extra": torch.ones(2)}, ["1 unexpected", "model.extra"]),
        ({HEAD: torch.ones(3, 3)}, ["1 of another shape", HEAD, "[3, 3]"]),
        ({HEAD: None, "a": torch.ones(1), "b": torch.ones(1)}, ["1 missing", "2 unexpected: a, b"]),
    ],
)
def test_tensors_that_do_not_fit_are_listed_by_their_own_names(llada, changes, words):
    tensors = {name: tensor for name, tensor in (LLADA.tensors() | changes).items() if tensor is not None}
    save_file(tensors, llada / SINGLE)
    for refuse in (refused, lambda folder: str(pytest.raises(ModelError, check_model, folder).value)):
        message = refuse(llada)
        for word in ("do not fit llada", *words):
            assert word in message, message


def test_experts_of_another_width_are_listed(tmp_path):
    folder, tensors = write(tmp_path, PLAIN["llada2"]), PLAIN["llada2"].tensors()
    name = next(name for name in tensors if "experts.3.down_proj" in name)
    save_file(tensors | {name: torch.ones(5, 5)}, folder / SINGLE)
    assert "of another shape" in refused(folder)


def test_masks_that_cannot_be_right(llada):
    change(llada / "config.json", mask_token_id=999)
    message = refused(llada)
    assert "MASK has id 999" in message and "model.mask_token_id" in message
    change(llada / "config.json", mask_token_id=9)
    message = refused(llada)
    assert "MASK has id 9 by config.json" in message and "'<mask>' with id 2" in message
    assert load_model(llada, mask_token_id=9).spec.mask_token_id == 9
    assert load_model(llada, mask_token_id=2).spec.mask_token_id == 2
    change(llada / "config.json", mask_token_id=None)
    assert load_model(llada).spec.mask_token_id == 2, "the tokenizer's"


@pytest.mark.parametrize("value", ["x", -1, 0, 1.5, [], {"a": 1}])
def test_values_of_config_json_that_make_no_sense_are_one_error_or_none(llada, value):
    """Whatever stands under a key: the folder loads or is refused, by a message."""
    plain = json.loads((llada / "config.json").read_text())
    for key in (*plain, "pad_token_id", "block_size", "eos_token_id", "diffusion", "rope_scaling", "tie_word_embeddings"):
        (llada / "config.json").write_text(json.dumps(plain | {key: value}))
        try:
            check_model(llada)
        except ModelError as error:
            assert str(llada) in str(error)


def test_ids_that_are_none_are_refused(llada):
    (llada / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    assert "generation_config.json: eos_token_id is ['</s>']" in refused(llada)
    (llada / "generation_config.json").unlink()
    entry = {"mask_token_id": 2, "attention": "full", "block_size": 0}
    change(llada / "config.json", diffusion=entry | {"suppressed_ids": [5000]})
    assert "the id 5000" in refused(llada)
    change(llada / "config.json", diffusion=entry | {"eos_token_ids": [1], "suppressed_ids": [1]})
    assert "the id 1 ends a response and is MASK or suppressed" in refused(llada)


def test_a_tokenizer_of_another_model(llada):
    character_tokenizer("".join(chr(0x4E00 + i) for i in range(60))).save_pretrained(llada)
    message = refused(llada)
    assert "id 63" in message and "do not belong together" in message


def test_a_folder_without_tokenizer_loads_and_says_what_it_lacks(llada):
    for path in llada.glob("*token*"):
        path.unlink()
    assert load_model(llada).spec.mask_token_id == 2
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(llada)


def test_a_model_made_here_is_written_as_its_stock_class(tmp_path):
    model, tokenizer = tiny("block")
    save_model(model, tokenizer, tmp_path, shard_bytes=10_000)
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == {name for name, _ in model.lm.named_parameters()}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.lm.parameters())
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / file).values()) for file in set(index["weight_map"].values())}
    assert len(sizes) > 3 and all(size <= 10_000 for size in sizes.values())
    save_model(load_model(tmp_path), tokenizer, tmp_path / "one")
    assert (tmp_path / "one" / SINGLE).is_file() and not (tmp_path / "one" / INDEX).exists()


def test_adapters_are_merged_into_the_layout_that_was_read(llada, tmp_path):
    from rlpipe.models.adapters import add_adapters

    model = load_model(llada)
    add_adapters(model.lm, rank=2, alpha=4.0, dropout=0.0, targets=["q_proj", "down_proj"])
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_model(model, load_tokenizer(llada), tmp_path / "out")
    saved, published = (load_file(folder / SINGLE) for folder in (tmp_path / "out", llada))
    assert saved.keys() == published.keys()
    moved = {name.rsplit(".", 2)[1] for name in saved if not torch.equal(saved[name], published[name])}
    assert moved == {"q_proj", "ff_out"} and torch.equal(saved[HEAD], published[HEAD])
    assert (tmp_path / "out" / SINGLE).stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_a_full_disk_is_an_operating_system_error(tmp_path):
    writer = ShardWriter(tmp_path / "nowhere")
    writer.add("a", torch.ones(2))
    with pytest.raises(OSError):
        writer.close()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A local cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def publish(cache: Path, plain) -> Path:
    home = cache / "models--someone--a-model"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    return write(snapshot, plain)


def test_hub_ids_are_taken_from_the_local_cache(cache):
    snapshot = publish(cache, SDAR)
    assert hub.model_folder("someone/a-model") == snapshot == hub.model_folder("someone/a-model", COMMIT)
    assert load_model("someone/a-model").spec == read_spec(snapshot)
    assert load_tokenizer("someone/a-model").mask_token_id == 2
    message = refused("someone/a-model", revision="v2")
    assert "hf download someone/a-model --revision v2" in message


def test_hub_ids_that_are_not_here_say_how_to_get_them(cache):
    message = refused("someone/else")
    for words in ("no such folder", "not in the local cache", "hf download someone/else", "model.path=FOLDER"):
        assert words in message, message
    elsewhere = cache / "models--someone--else" / "snapshots" / COMMIT  # another node's cache
    assert f"hf download someone/else --revision {COMMIT}" in refused(elsewhere)
    assert "no such folder" in refused("/no/where/at/all")


def test_loading_says_nothing_on_the_console(llada):
    code = f"from rlpipe.models import loading as l; l.load_model({str(llada)!r}); l.load_tokenizer({str(llada)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
