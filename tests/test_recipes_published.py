"""Recipes of published methods: every number that the publication gives, where it stands, and that a run could start."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml

from rlpipe import plan, recipe
from rlpipe.contradictions import decoder_of_eval
from rlpipe.decoder_presets import PRESETS
from rlpipe.models.spec import DiffusionSpec
from rlpipe.objectives.advantages import has_signal
from rlpipe.objectives.objective import build_objective
from rlpipe.run import main
from rlpipe.sampling.decoder import Decoder
from rlpipe.schema import flat, flatten

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Machines, memory and paths are ours to choose; everything else that a recipe says must be in the tables below.
OURS = re.compile(
    r"base|description|model\.path|data\.(task|train|test|template|max_prompt_tokens)|eval\.prompts|.*\.(workers|cpus|gpus|batch_size|slots|timeout_s|offload|refill_rounds)"
    r"|.*\.(token_budget|activation_checkpointing)|parity\.max_abs_delta"
)


def keyed(prefix: str, **values) -> dict:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def algo(**values) -> dict:
    return keyed("algo", **values)


def decoder(**values) -> dict:
    return keyed("rollout.decoder", **values)


def learner(**values) -> dict:
    return keyed("learner", **values)


def clip(epsilon: float) -> dict:
    return algo(clip_low=epsilon, clip_high=epsilon)


BOXED = {"math": {"extract": "boxed"}}
PLAIN_ADAM = learner(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, grad_clip=1.0, lora_rank=0)
D1_ADAM = learner(betas=[0.9, 0.99], eps=1e-8, grad_clip=0.2, zero_stage=2)  # d1 (arXiv 2504.12216) and what grew from it
D1_ADAPTERS = learner(lora_rank=128, lora_alpha=64, lora_dropout=0.05, lora_targets=SEVEN)
INITIAL = algo(kl_reference="initial")

# arXiv 2509.06949; github.com/Gen-Verse/dLLM-RL: configs/rl_sdar.yaml
TRACERL_MATH = {
    "seed": 10086, "steps": 80, "checkpoint.every": 10, "eval.every": 10, "eval.samples": 3,
    "eval.decoder": {"select": "static", "temperature": 0.0},
    "model.dtype": "bfloat16", "model.block_size": 4, "verifier.name": "math", "verifier.options": BOXED,
    "algo.overlong": "zero",
    **decoder(max_tokens=2000, select="threshold", threshold=0.9, score="sampled_prob", temperature=1.0, top_p=1.0, top_k=0),
    **algo(preset="tracerl", prompts_per_step=64, samples_per_prompt=16, shrink=1, advantage="zscore", ratio="token"),
    **clip(0.2), **algo(kl_coef=0.01, kl_estimator="k3", kl_reference="old", normalizer="response_length", kl_normalizer=""),
    **algo(updates_per_step=8, epochs=1, groups="drop", accuracy_low=0.2, accuracy_high=0.8),
    **PLAIN_ADAM, **learner(lr=1e-6, lr_schedule="constant", zero_stage=3, offload=True),
}  # fmt: skip
# README.md of github.com/autonomousvision/mdpo (arXiv 2508.13148), --num_processes 8
MDPO_MATH = {
    "seed": 42, "steps": 178, "checkpoint.every": 20, "eval.every": 20, "model.dtype": "bfloat16", "verifier.name": "math",
    "eval.decoder": {"select": "static", "temperature": 0.0},
    **decoder(preset="llada_low_confidence", block_size=512, steps=128, schedule="even", select="static"),
    **decoder(score="sampled_prob", confidence="sampler", edit="none", stop="length", max_tokens=512, temperature=0.4),
    **decoder(top_p=1.0, top_k=0),
    **algo(preset="mdpo", options={"steps": 8, "stride": 1}, prompts_per_step=16, samples_per_prompt=8, updates_per_step=8),
    **algo(epochs=1, advantage="zscore", ratio="token", normalizer="step_sum", groups="keep", accuracy_low=0, accuracy_high=1),
    **clip(0.2), **INITIAL, **algo(kl_coef=0.02, kl_estimator="k2"),
    **PLAIN_ADAM, **learner(lr=7e-7, lr_schedule="constant", lr_warmup=0, zero_stage=2, offload=True),
}  # fmt: skip
# arXiv 2509.23924; github.com/yjyddq/EOSER-ASS-RL: cj-grpo/slurm_scripts/train.yaml and sudoku_run.sh
CJ_GRPO_SUDOKU = {
    "seed": 42, "steps": 625, "checkpoint.every": 63, "eval.every": 63, "model.dtype": "bfloat16", "verifier.name": "sudoku",
    "verifier.options": {"sudoku": {"extract": "tag", "partial": True}},
    "eval.decoder": {"select": "static", "temperature": 0.0, "max_tokens": 256},
    **decoder(preset="eoser_ass", schedule="doubling", eos_gamma=0.01, block_size=0, score="sampled_prob", confidence="model"),
    **decoder(stop="length", max_tokens=128, temperature=1.0, top_p=1.0, top_k=0),
    **algo(preset="cj_grpo", options={"tail": True}, prompts_per_step=16, samples_per_prompt=6, updates_per_step=1, epochs=8),
    **algo(shrink=1, advantage="mean", ratio="token", normalizer="step_mean", kl_coef=0.04, kl_estimator="k3", groups="keep"),
    **clip(0.5), **INITIAL, **D1_ADAM, **D1_ADAPTERS, **learner(lr=3e-6, lr_schedule="constant", weight_decay=0.1),
}  # fmt: skip

ONE_BLOCK = r"(?s)(?:(?!```).)*```python\n(?:(?!```).)*```\n?"  # and nothing behind it

PUBLISHED = {
    "tracerl_math": TRACERL_MATH,
    # configs/rl_sdar_with_value.yaml
    "tracerl_math_value": TRACERL_MATH | keyed("value", enabled=True, lr=5e-6, gamma=1.0, lam=1.0),
    # configs/rl_sdar_code.yaml; groups: reward/rl_execute.py
    "tracerl_code": TRACERL_MATH
    | {"verifier.name": "code", "verifier.options": BOXED | {"code": {"partial": True}}}
    | algo(groups="drop", accuracy_low=0.0, accuracy_high=1.0, overlong="score"),
    "tracerl_sdar_1.7b": TRACERL_MATH | {"learner.offload": False},
    # configs/rl_llada.yaml; normalizers: train/rl_llada.py; evaluation samples: configs/llada_eval.yaml
    "tracerl_llada_math": TRACERL_MATH
    | {"steps": 50, "model.block_size": 0, "eval.decoder": {"select": "static", "temperature": 0.1}}
    | decoder(preset="llada_low_confidence", block_size=32, steps=32, schedule="even", select="static", stop="length")
    | decoder(max_tokens=512, temperature=0.8, confidence="model", cache="auto")
    | algo(prompts_per_step=32, samples_per_prompt=8, shrink=8, normalizer="row_mean", kl_normalizer="row_sum")
    | algo(updates_per_step=4),
    "mdpo_math": MDPO_MATH,
    "mdpo_countdown": MDPO_MATH | {"verifier.name": "countdown", "verifier.options": {"countdown": {"extract": "auto"}}},
    "cj_grpo_sudoku": CJ_GRPO_SUDOKU,
    # cj-grpo/slurm_scripts/math_run.sh: 12 inner iterations
    "cj_grpo_math": CJ_GRPO_SUDOKU
    | {"steps": 417, "checkpoint.every": 42, "eval.every": 42, "verifier.name": "math"}
    | {"verifier.parts": {"math": 2.0, "format": 0.5}}  # one-step-grpo/reward_func.py, less a constant
    | {"verifier.options": CJ_GRPO_SUDOKU["verifier.options"] | BOXED | {"format": {"pattern": "(?s).*<answer>.*"}}}
    | algo(epochs=12, accuracy_low=0, accuracy_high=1),
    # arXiv 2506.20639; github.com/apple/ml-diffucoder: recipes/config_coupled_code.yaml; top-p: src/open_r1/coupled_grpo.py
    "coupled_grpo_code": {
        "seed": 42, "steps": 21_000 // 8, "checkpoint.every": 100, "eval.every": 100, "model.dtype": "bfloat16",
        "verifier.parts": {"code": 2.0, "format": 0.5}, "eval.decoder": {"select": "static", "temperature": 0.4},
        "verifier.options": {"code": {"partial": True}, "format": {"pattern": ONE_BLOCK}},
        **decoder(preset="dream_entropy", schedule="dream", steps=256, score="entropy", order_temperature=0.0),
        **decoder(confidence="sampler", stop="length", max_tokens=256, temperature=1.0, top_p=0.95, top_k=0),
        **algo(preset="coupled_grpo", options={"low": 0.2, "high": 0.8}, prompts_per_step=8, samples_per_prompt=10),
        **algo(updates_per_step=1, epochs=2, advantage="leave_one_out", ratio="position", normalizer="token_mean"),
        **algo(kl_coef=0.01, kl_estimator="k3", kl_reference="lagged", kl_lag=32, kl_mix=0.6, groups="keep"), **clip(0.5),
        **D1_ADAM, **learner(lr=1e-6, lr_schedule="cosine", lr_floor=0.1, weight_decay=0.1, lora_rank=0),
    },
    # arXiv 2601.15165; github.com/LeapLabTHU/JustGRPO: train.py (TrainConfig), grpo.py, README.md (global batch of 64)
    "just_grpo_gsm8k": {
        "seed": 1234, "steps": 125, "checkpoint.every": 10, "eval.every": 10, "model.dtype": "bfloat16",
        "verifier.name": "math",
        "eval.decoder": {"preset": "llada_low_confidence", "select": "static", "temperature": 0.0},
        **decoder(preset="left_to_right", score="left_to_right", block_size=1, tokens_per_step=1, max_tokens=256),
        **decoder(temperature=1.0, top_p=1.0, top_k=0),
        **algo(preset="just_grpo", options={"fraction": 1.0}, prompts_per_step=64, samples_per_prompt=8 * 2),
        **algo(updates_per_step=1, epochs=1, advantage="zscore", ratio="token", normalizer="constant", kl_coef=0.0),
        **algo(groups="drop", accuracy_low=0, accuracy_high=1), **clip(0.2),
        **PLAIN_ADAM, **learner(lr=5e-6, lr_schedule="constant", lr_warmup=0, zero_stage=3),
    },
    # arXiv 2512.03759; github.com/ML-GSAI/ESPO: recipes/run_countdown_llada.sh over recipes/train.yaml; blocks: espo_trainer.py
    "espo_countdown": {
        "seed": 42, "steps": 625, "checkpoint.every": 63, "eval.every": 63, "model.dtype": "bfloat16",
        "verifier.name": "countdown", "eval.decoder": {"select": "static", "temperature": 0.0},
        "verifier.options": {"countdown": {"extract": "tag", "partial": 0.1}},
        **decoder(preset="llada_low_confidence", block_size=32, steps=128 // 8, schedule="even", score="sampled_prob"),
        **decoder(confidence="model", stop="length", max_tokens=256, temperature=1.0, top_p=1.0, top_k=0),
        **algo(preset="espo", options={"draws": 2, "complement": True}, prompts_per_step=16, samples_per_prompt=6),
        **algo(updates_per_step=1, epochs=8, advantage="leave_one_out", ratio="sequence", normalizer="sequence_mean"),
        **algo(kl_coef=3e-3, kl_estimator="k2", kl_normalizer="length_sum", groups="keep"), **clip(0.0), **INITIAL,
        **D1_ADAM, **D1_ADAPTERS, **learner(lr=3e-6, lr_schedule="constant", lr_warmup=5, weight_decay=0.01),
    },
}  # fmt: skip
BLOCK = ("tracerl_math", "tracerl_math_value", "tracerl_code", "tracerl_sdar_1.7b")
OWN = ("quickstart", "sft_", "tracerl_smollm2")  # recipes that no publication stands behind
EVERY = pytest.mark.parametrize("name", PUBLISHED)


def load(name: str, *overrides: str):
    return recipe.load([f"recipe={name}", *overrides])


def spec_of(name: str) -> DiffusionSpec:
    """As the published model attends."""
    if name in BLOCK:
        return DiffusionSpec(mask_token_id=0, attention="block", block_size=4)
    return DiffusionSpec(mask_token_id=0, attention="full", block_size=0, logit_shift=int(name == "coupled_grpo_code"))


def commits(settings) -> list[int]:
    """Tokens of each step of one block, under full attention."""
    made = Decoder.resolve(settings, DiffusionSpec(mask_token_id=0, attention="full", block_size=0))
    opened = torch.tensor([made.block_size or made.max_tokens])
    left, counts = opened.clone(), []
    while left.item():
        counts.append(int(made.schedule.commits(opened, left, torch.tensor([len(counts)]))))
        left -= counts[-1]
    return counts


def header(name: str) -> str:
    """The comment that a recipe opens with."""
    lines = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_the_tables_hold_every_published_recipe():
    assert sorted(PUBLISHED) == [name for name in SHIPPED if not name.startswith(OWN)]


@EVERY
def test_numbers_are_the_published_ones(name):
    said, wanted = flat(load(name)), PUBLISHED[name]
    assert {key: said[key] for key in wanted} == wanted


@EVERY
def test_whatever_a_recipe_says_is_in_its_table(name):
    tree = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf8"))
    assert [key for key in flatten(tree) if key not in PUBLISHED[name] and not OURS.fullmatch(key)] == []


@EVERY
def test_recipes_name_their_paper_and_are_in_the_list(name):
    paper = re.search(r"arXiv \d{4}\.\d{5}", header(name))
    lines = (ROOT / "docs/recipes.md").read_text(encoding="utf8").splitlines()
    assert paper and paper[0] in next(line for line in lines if line.startswith(f"| `{name}` | "))


@EVERY
def test_a_run_could_start_from_a_folder_that_attends_as_the_model_does(name, tmp_path):
    spec = spec_of(name)
    (tmp_path / "config.json").write_text(json.dumps({"diffusion": spec.to_dict()}))
    cfg = load(name, f"model.path={tmp_path}")
    recipe.check(cfg)
    plan.describe(cfg, {"CPU": 64.0, "GPU": 16.0, "memory": 2.0**40})
    for settings in (cfg.rollout.decoder, decoder_of_eval(cfg)):
        Decoder.resolve(settings, spec)
        assert not settings.preset or PRESETS[settings.preset].attention in ("any", spec.attention)
    objective = build_objective(cfg.algo, cfg.rollout.decoder.max_tokens)
    assert objective.needs_step_rewards == (cfg.algo.preset == "mdpo")


def test_decoding_takes_the_published_steps():
    steps = {name: commits(load(name).rollout.decoder) for name in PUBLISHED if name not in BLOCK}
    assert steps["tracerl_llada_math"] == [1] * 32  # 512 steps for 512 tokens in blocks of 32
    assert steps["mdpo_math"] == steps["mdpo_countdown"] == [4] * 128
    assert steps["cj_grpo_sudoku"] == steps["cj_grpo_math"] == [1, 2, 4, 8, 16, 32, 65]
    assert len(commits(decoder_of_eval(load("cj_grpo_math")))) == 8
    assert steps["espo_countdown"] == [2] * 16
    assert steps["just_grpo_gsm8k"] == [1]
    assert commits(decoder_of_eval(load("just_grpo_gsm8k"))) == [1] * 32
    assert sum(steps["coupled_grpo_code"]) == 256 and len(steps["coupled_grpo_code"]) == 256


@pytest.mark.parametrize(
    ("name", "responses"),
    [  # GPUs × responses a GPU × accumulation, of one optimizer update
        ("cj_grpo_sudoku", 8 * 6 * 2),
        ("cj_grpo_math", 8 * 6 * 2),
        ("coupled_grpo_code", 8 * 5 * 2),
        ("espo_countdown", 8 * 3 * 4),
        ("just_grpo_gsm8k", 64 * 16),
        ("mdpo_math", 8 * 1 * 16 // 8),  # 16 backward passes, 8 to a prompt
    ],
)
def test_an_update_sees_as_many_responses_as_published(name, responses):
    algo = load(name).algo
    assert algo.prompts_per_step * algo.samples_per_prompt / algo.updates_per_step == responses


def test_updates_between_two_moves_of_the_lagged_reference():
    algo = load("coupled_grpo_code").algo
    assert algo.kl_lag * algo.updates_per_step * algo.epochs == 64


def test_the_band_of_accuracies_keeps_the_published_groups():
    for name, samples in (("tracerl_math", 16), ("tracerl_llada_math", 8)):
        algo = load(name).algo
        kept = [
            k
            for k in range(samples + 1)
            if has_signal([1.0] * k + [0.0] * (samples - k), algo.accuracy_low, algo.accuracy_high)
        ]
        assert kept == [k for k in range(samples + 1) if Fraction(1, 5) <= Fraction(k, samples) <= Fraction(4, 5)]


def test_a_verifier_that_is_not_there_does_not_stop_a_plan():
    assert main(["recipe=tracerl_code", "verifier.name=not_built_in", "dry_run=true", "cluster.address=local"]) == 0
