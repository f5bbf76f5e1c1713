"""`python -m rlpipe.models inspect`, shapes and the memory of roles: what a model is, told without reading its weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_architectures import LLADA, PLAIN
from test_families import family_of, write

from rlpipe.model_shapes import BLOCK_OF_ARCHITECTURE, PUBLISHED, Shape, block_of, shape_of
from rlpipe.models import memory
from rlpipe.models.__main__ import main
from rlpipe.models.families import FAMILIES
from rlpipe.models.inspection import inspect, text

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("key", PLAIN)
def test_the_shape_of_a_config_gives_its_parameters(key):
    found = shape_of(PLAIN[key].config)
    tensors = PLAIN[key].tensors()
    small = sum(t.numel() for name, t in tensors.items() if t.ndim == 1)  # biases and head norms are not counted
    exact = sum(t.numel() for t in tensors.values())
    assert exact - small <= found.parameters <= exact + small
    assert found.active <= found.parameters and (found.active < found.parameters) == bool(found.experts)


@pytest.mark.parametrize("key", PLAIN)
def test_the_block_of_a_config_is_the_familys(key):
    plain, family = PLAIN[key], FAMILIES[family_of(key)]
    if key != "open_dcoder":  # only its tokenizer tells it from a plain causal LM
        assert block_of(plain.config) == family.spec(plain.config | {"mask_token_id": 2}).block_size
    spec = family.spec(plain.config | {"mask_token_id": 2}).to_dict()
    assert block_of({"diffusion": spec}) == spec["block_size"]


def test_the_table_of_architectures_is_that_of_the_families():
    known = {
        name: family.block_size
        for family in FAMILIES.values()
        for name in family.architectures
        if family.name not in ("stock", "open_dcoder")
    }
    assert known == BLOCK_OF_ARCHITECTURE
    assert block_of({"architectures": ["LlamaForCausalLM"]}) is None
    sdar = {"architectures": ["SDARForCausalLM"]}
    assert [block_of(sdar | said) for said in ({}, {"block_size": None}, {"block_length": 8}, {"block_size": 16})] == [
        4,
        4,
        8,
        16,
    ]


@pytest.mark.parametrize("value", ["x", 1.5, {"a": 1}, []])
def test_a_config_that_makes_no_sense_has_no_shape(value):
    for key in ("architectures", "hidden_size", "num_attention_heads", "moe_layer_freq", "num_experts"):
        config = PLAIN["llada2"].config | {key: value}
        assert shape_of(config) is None or key in ("architectures", "moe_layer_freq", "num_experts")
        assert block_of(config) == (None if key == "architectures" else 8)


@pytest.mark.parametrize(
    "name, billions",
    [
        ("JetLM/SDAR-4B-Chat", 4.41), ("Gen-Verse/TraDo-8B-Instruct", 8.19), ("GSAI-ML/LLaDA-8B-Instruct", 8.02),
        ("Dream-org/Dream-v0-Instruct-7B", 7.62), ("JetLM/SDAR-30B-A3B-Chat", 30.5), ("inclusionAI/LLaDA2.0-mini", 16.26),
        ("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", 7.36), ("fredzzp/open-dcoder-0.5B", 0.494),
    ],
)  # fmt: skip
def test_published_sizes(name, billions):
    """As their model cards give them."""
    assert PUBLISHED[name].shape.parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_the_memory_of_a_rollout_worker_by_hand():
    shape = Shape(layers=2, width=8, mlp=16, heads=2, kv_heads=1, head_dim=4, vocabulary=10)
    parts = memory.rollout_parts(shape, 1000, 2, slots=3, tokens=7, rows=5)
    assert {part.name: part.nbytes for part in parts} == {
        "weights": 2000,
        "KV cache": 3 * 7 * (2 * 2 * 1 * 4) * 2,
        "logits": 5 * 10 * 4,
    }
    assert memory.fitting(parts) == list(memory.GPUS_GB)
    assert memory.fitting([memory.Part("x", 45e9, ""), memory.Part("y", 9e12, "", on_host=True)]) == [80, 141]
    assert "fits none" in memory.table("learner", [memory.Part("x", 1e12, "")])


def test_the_memory_of_adapters_is_theirs():
    from rlpipe.config import ModelConfig
    from rlpipe.models.adapters import add_adapters
    from rlpipe.models.tiny import build_tiny

    config = ModelConfig(layers=2, width=32, heads=2, mlp=64)
    shape = Shape(layers=2, width=32, mlp=64, heads=2, kv_heads=2, head_dim=16, vocabulary=20)
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    model, _ = build_tiny(config, "0123456789", 0)
    add_adapters(model.lm, rank=4, alpha=4.0, dropout=0.0, targets=targets)
    assert memory.adapter_parameters(shape, 4, targets) == sum(p.numel() for p in model.lm.parameters() if p.requires_grad)


def test_activations_are_of_the_right_size():
    """Against what autograd keeps for the backward pass of a stock model."""
    from rlpipe.config import ModelConfig
    from rlpipe.models.attention import DensePlan
    from rlpipe.models.tiny import build_tiny

    width, mlp, tokens, layers = 128, 512, 256, 4
    model, _ = build_tiny(ModelConfig(path="tiny:full", layers=layers, width=width, heads=4, mlp=mlp), "0123456789", 0)
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.nbytes)
        return tensor

    ids = torch.randint(4, 12, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(ids, torch.arange(tokens)[None], DensePlan(None))
    assert hidden.requires_grad
    shape = Shape(layers=layers, width=width, mlp=mlp, heads=4, kv_heads=4, head_dim=width // 4, vocabulary=14)
    settings = {"ranks": 1, "stage": 0, "offload": False, "token_budget": tokens}
    parts = {p.name: p.nbytes for p in memory.learner_parts(shape, 0, 4, checkpointing=False, **settings)}
    assert parts["activations"] == pytest.approx(sum(kept.values()), rel=0.33)
    fewer = {p.name: p.nbytes for p in memory.learner_parts(shape, 0, 4, checkpointing=True, **settings)}
    assert fewer["activations"] < parts["activations"] / 2


def test_a_folder_that_works(tmp_path, capsys):
    folder = write(tmp_path, PLAIN["llada2"], torch.bfloat16)
    (folder / "modeling_llada2.py").write_text("raise SystemExit('executed')\n")
    assert main(["inspect", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    tensors = PLAIN["llada2"].tensors()
    assert said["works"] and said["problems"] == [] and said["family"] == "llada2"
    assert (said["architecture"], said["stock_class"]) == ("LLaDA2MoeModelLM", "Glm4MoeForCausalLM")
    assert said["parameters"] == sum(t.numel() for t in tensors.values()) > said["active_parameters"]
    assert list(said["dtypes"]) == ["BF16", "F32"] and said["files"] == 1
    assert said["bytes_on_disk"] == (folder / "model.safetensors").stat().st_size
    assert (said["mask"], said["eos"]) == ([2, "<mask>"], [[1, "<eos>"]])
    assert (said["attention"], said["block_size"], said["logit_shift"]) == ("block", 8, 0)
    assert said["own_code"] == ["modeling_llada2.py"] and said["chat_template"] is False
    assert said["memory"].keys() == {"rollout", "learner", "1 of 8"}
    assert main(["inspect", str(folder), "block_size=16"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "will work",
        "note: no chat template",
        "block of 16; logits in place",
        "never run",
        "KV cache",
        "fits GPUs of 24",
    ):
        assert words in shown


def test_all_problems_are_told_at_once(tmp_path, capsys):
    folder = write(tmp_path, LLADA, mask_token_id=777)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert main(["inspect", str(folder)]) == 2
    shown = capsys.readouterr().out
    for words in ("will not work", "MASK has id 777", "truncated", "llada (LLaDAModelLM)", "model.mask_token_id"):
        assert words in shown
    for path in folder.glob("*token*"):
        path.unlink()
    assert len(inspect(str(folder)).problems) == 3
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert "the nearest known is" in inspect(str(folder)).problems[0]
    (folder / "config.json").unlink()
    found = inspect(str(folder))
    assert "no config.json" in found.problems[0] and text(found).startswith(f"{folder}: will not work")


def test_tensors_are_compared_without_reading_them(tmp_path):
    folder = write(tmp_path, LLADA, n_layers=5)
    found = inspect(str(folder))
    assert "missing: model.transformer.blocks.3" in found.problems[0] and found.family == "llada"


def test_what_a_run_makes_cannot_be_looked_at_before(capsys):
    assert main(["inspect", "tiny:block"]) == 2
    assert "made when a run starts" in capsys.readouterr().out


def test_the_rows_of_a_rollout_are_those_of_its_blocks(tmp_path):
    for key, rows in (("llada", 64 * 32), ("sdar", 64 * 4)):
        (tmp_path / key).mkdir()
        logits = inspect(str(write(tmp_path / key, PLAIN[key]))).memory["rollout"][2]
        assert logits["how"].startswith(f"{rows} rows"), key


@pytest.mark.parametrize("arguments", [[], ["look", "x"], ["inspect"], ["inspect", "a", "b"], ["inspect", "x", "blok=3"]])
def test_a_wrong_command_says_what_is_right(arguments, capsys):
    assert main(arguments) == 2
    assert "usage" in (said := capsys.readouterr().err) or "settings are" in said
    assert main(["--help"]) == 0


def test_the_command_line(tmp_path):
    folder = write(tmp_path, LLADA)
    command = [sys.executable, "-m", "rlpipe.models", "inspect", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "will work" in done.stdout and done.stderr == ""


def test_shapes_and_memory_load_nothing_heavy():
    code = "import sys, rlpipe.models.memory, rlpipe.models.checkpoint_files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
