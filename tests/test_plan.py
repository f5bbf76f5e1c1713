"""The plan of a run: roles, memory and the arithmetic of one step, worked out without starting anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlpipe import plan, recipe
from rlpipe.config import RunConfig
from rlpipe.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SDAR_LIKE = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


def load(*overrides: str) -> RunConfig:
    return recipe.load(["recipe=quickstart", *overrides])


def model_folder(folder: Path, **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(SDAR_LIKE | changes))
    return folder


@pytest.mark.parametrize("kind", ["tiny:block", "tiny:full"])
def test_the_size_of_tiny_models_is_close(kind):
    from rlpipe.models.tiny import build_tiny

    cfg = load(f"model.path={kind}")
    model, _ = build_tiny(cfg.model, "0123456789_", 0)
    assert plan.parameter_count(cfg) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.05)


def test_the_size_of_a_folder_is_read_from_its_config(tmp_path):
    cfg = load(f"model.path={model_folder(tmp_path)}")
    layer = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560
    assert plan.parameter_count(cfg) == 36 * layer + 2 * 151936 * 2560 + 2560
    tied = load(f"model.path={model_folder(tmp_path, tie_word_embeddings=True)}")
    assert plan.parameter_count(tied) == 36 * layer + 151936 * 2560 + 2560
    assert plan.parameter_count(load(f"model.path={tmp_path / 'nowhere'}")) is None


def test_memory_follows_the_zero_stage(tmp_path):
    count = plan.parameter_count(load(f"model.path={model_folder(tmp_path)}"))

    def learner_gb(*overrides: str) -> float:
        cfg = load(f"model.path={tmp_path}", "model.dtype=bfloat16", "learner.workers=4", *overrides)
        return {role.name: role for role in plan.roles(cfg)}["learner"].memory_gb - plan.PROCESS_GB

    whole = count / 2**30
    assert learner_gb("learner.zero_stage=0") == pytest.approx(whole * (2 + 2 + 12))
    assert learner_gb("learner.zero_stage=1") == pytest.approx(whole * (2 + 2 + 12 / 4))
    assert learner_gb("learner.zero_stage=2") == pytest.approx(whole * (2 + 2 / 4 + 12 / 4))
    assert learner_gb("learner.zero_stage=3") == pytest.approx(whole * (2 + 2 + 12) / 4)


def test_roles_are_what_the_recipe_asks_for():
    cfg = recipe.load(["recipe=tracerl_math"])
    asked = {role.name: (role.workers, role.cpus, role.gpus) for role in plan.roles(cfg)}
    assert asked == {"rollout": (4, 1.0, 1.0), "verifier": (16, 0.5, 0.0), "learner": (4, 1.0, 1.0)}
    memory = {role.name: role.memory_gb for role in plan.roles(cfg)}
    assert memory["learner"] == pytest.approx(plan.PROCESS_GB + 4.411e9 * 14 / 4 / 2**30, rel=1e-3), "what is offloaded"
    assert memory["rollout"] == plan.PROCESS_GB, "the weights are on the GPU"
    unknown = plan.roles(recipe.load(["recipe=tracerl_math", "model.path=no/such-model"]))
    assert {role.memory_gb for role in unknown if role.name != "verifier"} == {0.0}


def test_the_arithmetic_of_the_quickstart():
    text = plan.step_arithmetic(load("algo.shrink=1"))
    for part in ("16 prompts × 8 samples = 128 responses", "2048 tokens", "block 4", "4 row(s) a response = 512 rows"):
        assert part in text
    assert "at most 80 tokens a response besides the prompt = 10240 tokens" in text
    assert "2 update(s) × 1 epoch(s), 64 responses each, about 1 micro-batch" in text


def test_the_arithmetic_counts_micro_batches():
    block = load("learner.token_budget=160")  # 80 tokens a response: two together, 64 responses an update
    assert "about 32 micro-batch(es)" in plan.step_arithmetic(block)
    ranks = load("learner.token_budget=160", "learner.workers=2")
    assert "about 16 micro-batch(es)" in plan.step_arithmetic(ranks)
    full = load("model.path=tiny:full", "algo.shrink=4", "learner.token_budget=160")  # 4 rows of 16: ten together
    text = plan.step_arithmetic(full)
    assert "whole canvas" in text and "4 row(s) a response" in text and "about 26 micro-batch(es)" in text
    assert "1 row(s) a response" in plan.step_arithmetic(load("algo.preset=random_mask"))


def test_the_block_of_a_folder_is_its_own(tmp_path):
    folder = model_folder(tmp_path, diffusion={"mask_token_id": 1, "attention": "block", "block_size": 8})
    assert "block 8," in plan.step_arithmetic(load(f"model.path={folder}"))
    model_folder(tmp_path, diffusion={"mask_token_id": 1, "attention": "full", "block_size": 0})
    assert "whole canvas," in plan.step_arithmetic(load(f"model.path={folder}"))
    assert "(assumed)" in plan.step_arithmetic(load("model.path=/nowhere"))


@pytest.mark.parametrize(
    "path, kind, millions",
    [("GSAI-ML/LLaDA-8B-Instruct", "whole canvas,", 8016), ("JetLM/SDAR-4B-Chat-b16", "block 16,", 4411)],
)
def test_a_published_model_that_is_not_here_is_planned_as_what_it_is(path, kind, millions):
    cfg = load(f"model.path={path}", "model.dtype=bfloat16")
    assert kind in plan.step_arithmetic(cfg) and "assumed" not in plan.step_arithmetic(cfg)
    assert plan.parameter_count(cfg) / 1e6 == pytest.approx(millions, abs=1)
    missing = plan.needs(cfg)[0]
    for words in (path, f"about {2 * millions / 1e3:.1f} GB in bfloat16", f"hf download {path}"):
        assert words in missing
    assert "size unknown" in plan.describe(load("model.path=no/such-model"), None)


def test_a_full_attention_model_that_is_given_a_grid_is_planned_with_it():
    cfg = load("model.path=GSAI-ML/LLaDA-8B-Instruct", "model.attention=block", "model.block_size=8")
    assert "block 8," in plan.step_arithmetic(cfg)
    with pytest.raises(ConfigError, match="model.attention=block"):
        recipe.check(load("model.path=GSAI-ML/LLaDA-8B-Instruct", "model.block_size=8"))
    with pytest.raises(ConfigError, match="say which with model.block_size"):
        recipe.check(load("model.path=GSAI-ML/LLaDA-8B-Instruct", "model.attention=block"))
    with pytest.raises(ConfigError, match="tiny:block"):
        recipe.check(load("model.attention=block"))


def test_memory_says_which_gpu_holds_a_role():
    cfg = load(
        "model.path=JetLM/SDAR-4B-Chat", "model.dtype=bfloat16", "rollout.decoder.max_tokens=1536", "learner.zero_stage=1",
        "learner.activation_checkpointing=true",
    )  # fmt: skip
    text = plan.memory(cfg)
    assert "a prompt is taken to have 512 tokens (assumed)" in text
    assert "64 slots × 2048 tokens × 144 KiB" in text and "4.41B × 12 B" in text
    each = 2048 * 2 * 36 * 8 * 128 * 2 + 4 * 151936 * 4
    free = 0.9 * 24e9 - 2 * plan.parameter_count(cfg)
    assert f"{int(free // each)} on 24 GB" in text and "64 on 80 GB" in text
    assert "(assumed)" not in plan.memory(load("data.max_prompt_tokens=40"))
    adapters = plan.memory(load("model.path=JetLM/SDAR-4B-Chat", "learner.lora_rank=16"))
    assert f"{16 * 36 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)) / 1e6:.2f}M × 8 B" in adapters


def test_weights_are_counted_and_checked_by_their_headers(tmp_path):
    from tiny_models import tiny

    from rlpipe.models.loading import save_model

    model, tokenizer = tiny("block")
    save_model(model, tokenizer, tmp_path)
    cfg = load(f"model.path={tmp_path}")
    assert plan.parameter_count(cfg) == sum(p.numel() for p in model.parameters())
    assert not [line for line in plan.needs(cfg) if "model" in line]
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in plan.needs(cfg)[0]
    assert plan.parameter_count(cfg) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


def test_needs_name_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "local_resources", lambda: {"CPU": 2.0, "GPU": 0.0, "memory": 2.0**34})
    real = plan.importlib.util.find_spec
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name, *at: None if name == "math_verify" else real(name, *at))
    missing = "\n".join(plan.needs(recipe.load(["recipe=tracerl_math_value"])))
    for part in (
        "JetLM/SDAR-4B-Chat (of about 8.8 GB in bfloat16)",
        "MATH_train",
        "MATH-500",
        "math_verify",
        "12 GPUs",
    ):
        assert part in missing
    assert plan.needs(load()) == []
    assert "'diffusion' entry" in plan.needs(load(f"model.path={model_folder(tmp_path)}"))[0]


def test_needs_look_at_the_value_model_and_at_what_is_converted():
    lines = plan.needs(load("value.enabled=true", "value.path=no/such/folder", "model.path=convert:nobody/model"))
    assert "the model to convert: nobody/model (of unknown size)" in lines[0]
    assert "the value model: no no/such/folder/config.json (value.path)" in lines[1]
    assert "the value model" not in "\n".join(plan.needs(load("value.path=no/such/folder")))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_a_plan_shows_configuration_placement_and_arithmetic(name):
    cfg = recipe.load([f"recipe={name}", "dry_run=true"])
    text = plan.describe(cfg, {"CPU": 64.0, "GPU": 8.0, "memory": 2.0**40})
    for part in (f"name: {name}", "rollout", "verifier", "learner", "1024.0 GB", "responses", "micro-batch"):
        assert part in text


def test_a_plan_starts_nothing_and_loads_nothing_heavy():
    code = (
        "import sys; from rlpipe.run import main; assert main(['recipe=tracerl_math', 'dry_run=true']) == 0; "
        "print([name for name in ('ray', 'torch', 'deepspeed', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
