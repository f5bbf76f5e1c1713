"""Recipes: what loads, what is refused, and with which words."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlpipe import recipe, schema
from rlpipe.config import RunConfig
from rlpipe.contradictions import CHOICES
from rlpipe.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
VARIANTS = ("full", "countdown", "value", "mdpo", "cj_grpo", "coupled")
RUNNABLE = ["quickstart", *(f"quickstart_{name}" for name in VARIANTS)]
PUBLISHED = [
    "tracerl_math", "tracerl_math_value", "tracerl_code", "tracerl_llada_math", "mdpo_math", "mdpo_countdown",
    "cj_grpo_sudoku", "cj_grpo_math", "coupled_grpo_code", "just_grpo_gsm8k", "espo_countdown", "tracerl_sdar_1.7b",
]  # fmt: skip
PRETRAINED = ["sft_smollm2_block", "tracerl_smollm2"]  # from real weights, on two CPU cores


def load(*overrides: str) -> RunConfig:
    return recipe.load(["recipe=quickstart", *overrides])


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf8")
    return path


def refused(arguments: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        recipe.check(recipe.load(arguments))
    return str(error.value)


def test_the_shipped_recipes_are_the_promised_ones():
    assert SHIPPED == sorted(RUNNABLE + PUBLISHED + PRETRAINED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_agree_with_themselves(name):
    cfg = recipe.load([f"recipe={name}", "dry_run=true"])
    recipe.check(cfg)
    assert cfg.name == name
    assert cfg.description.startswith(f"{name}:"), "a derived recipe must not show its base's description"


@pytest.mark.parametrize("name", RUNNABLE)
def test_recipes_with_a_warm_start_say_what_it_was_fed(name):
    cfg = recipe.load([f"recipe={name}"])
    assert recipe.check(cfg) == []
    assert cfg.warm_start.steps > 0 and cfg.data.options["careless"] == 0.55
    assert "55 %" in cfg.description and "warm start" in cfg.description


def test_published_hyper_parameters_of_tracerl_for_sdar():
    cfg = recipe.load(["recipe=tracerl_math"])
    algo, learner, decoder = cfg.algo, cfg.learner, cfg.rollout.decoder
    assert (algo.prompts_per_step, algo.samples_per_prompt, algo.shrink, algo.epochs) == (64, 16, 1, 1)
    assert (algo.clip_low, algo.clip_high, algo.kl_coef, algo.kl_estimator) == (0.2, 0.2, 0.01, "k3")
    assert (algo.normalizer, algo.advantage, algo.groups) == ("response_length", "zscore", "drop")
    assert (learner.lr, learner.lr_schedule, learner.betas, learner.eps) == (1e-6, "constant", [0.9, 0.999], 1e-8)
    assert (learner.weight_decay, learner.grad_clip, learner.zero_stage) == (0.0, 1.0, 3)
    assert (decoder.select, decoder.threshold, decoder.temperature, decoder.max_tokens) == ("threshold", 0.9, 1.0, 2000)
    assert (cfg.steps, cfg.eval.every, cfg.checkpoint.every, cfg.model.block_size) == (80, 10, 10, 4)
    kept = [k for k in range(17) if algo.accuracy_low < k / 16 < algo.accuracy_high]
    assert kept == [k for k in range(17) if 0.2 <= k / 16 <= 0.8], "the published bounds include their ends"
    value = recipe.load(["recipe=tracerl_math_value"]).value
    assert (value.enabled, value.lr, value.gamma, value.lam) == (True, 5e-6, 1.0, 1.0)


def test_overrides_by_type():
    cfg = load("learner.lr=1e-4", "steps=7", "rollout.decoder.score=random", "learner.betas=[0.8,0.9]", "learner.offload=yes")
    assert (cfg.learner.lr, cfg.steps, cfg.rollout.decoder.score) == (1e-4, 7, "random")
    assert cfg.learner.betas == [0.8, 0.9] and cfg.learner.offload is True
    assert load("data.options.careless=0.3").data.options == {"careless": 0.3}
    assert load("algo={shrink: 2, epochs: 3}").algo.epochs == 3


def test_texts_are_taken_as_they_stand():
    assert load("run_id=1e5").run_id == "1e5"
    assert load("run_id=20250101").run_id == "20250101"
    assert load("data.template={prompt} =").data.template == "{prompt} ="
    assert load("data.train=").data.train == ""
    assert load('data.template="{prompt}\\n"').data.template == "{prompt}\n"


def test_the_last_value_counts():
    cfg = recipe.load(["recipe=quickstart", "steps=1", "recipe=quickstart_full", "steps=2"])
    assert (cfg.name, cfg.steps) == ("quickstart_full", 2)


@pytest.mark.parametrize(
    "override, words",
    [
        ("algo.prompt_per_step=3", ["algo.prompt_per_step", "did you mean algo.prompts_per_step"]),
        ("lr=3", ["learner.lr", "warm_start.lr", "value.lr"]),
        ("max_token=3", ["did you mean rollout.decoder.max_tokens"]),
        ("algo={shrnk: 2}", ["there is no key algo.shrnk", "algo.shrink"]),
        ("qqq.zzz=1", ["there is no key qqq.zzz", "help=true"]),
        ("model=3", ["model is a section", "model.path"]),
        ("learner.lr=abc", ["learner.lr='abc'", "expected learner.lr (float"]),
        ("algo.shrink=1.5", ["algo.shrink=1.5 (float)", "(int: merge every s denoising steps"]),
        ("steps=true", ["steps=True (bool)", "(int"]),
        ("dry_run=maybe", ["'maybe'", "bool"]),
        ("learner.betas=[1,x]", ["learner.betas=[1, 'x']", "list[float]"]),
        ("learner.lr=null", ["learner.lr=None", "float"]),
        ("data.options=3", ["data.options=3", "dict"]),
        ("algo.shrink=[1", ["algo.shrink=[1", "not YAML"]),
        ("description=${nowhere}", ["nowhere"]),
        ("foo", ["'foo' is not key=value"]),
        ("=3", ["'=3' is not key=value"]),
        ("recipe=quikstart", ["no such recipe", "did you mean quickstart", "tracerl_math"]),
        ("recipe=/nowhere/quickstart.yaml", ["no file /nowhere/quickstart.yaml", "Known: "]),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_nearest_match(override, words):
    message = refused(["recipe=quickstart", override])
    for word in words:
        assert word in message, message


def test_without_a_recipe_the_known_ones_are_listed():
    message = refused(["steps=3"])
    assert all(name in message for name in SHIPPED)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("algo.updates_per_step=3", ["16 × 8 = 128", "divisor"]),
        ("rollout.batch_size=60", ["rollout.batch_size=60", "algo.samples_per_prompt=8", "use 64"]),
        ("algo.samples_per_prompt=1 rollout.batch_size=1", ["at least 2"]),
        ("learner.workers=100", ["128 / 2 = 64", "learner.workers=100"]),
        ("learner.betas=[0.9]", ["learner.betas=[0.9]", "two numbers"]),
        ("learner.betas=[0.9,1.0]", ["below 1"]),
        ("learner.zero_stage=4", ["learner.zero_stage=4", "at most 3"]),
        ("learner.offload=true learner.zero_stage=0", ["learner.offload", "zero_stage"]),
        ("learner.gpus=0.5 learner.workers=2", ["learner.gpus=0.5"]),
        ("algo.accuracy_low=0.5 algo.accuracy_high=0.5", ["below", "signal"]),
        ("model.block_size=8 rollout.decoder.block_size=4", ["blocks of 8"]),
        ("rollout.decoder.block_size=8", ["rollout.decoder.block_size=8", "blocks of 4"]),
        ("rollout.decoder.tokens_per_step=5", ["tokens_per_step=5", "4 tokens"]),
        ("model.path=tiny:full model.block_size=4", ["full attention"]),
        ("model.path=tiny:blok", ["did you mean tiny:block"]),
        ("model.width=36 model.heads=4", ["36", "= 9", "even"]),
        ("rollout.decoder.max_tokens=0", ["rollout.decoder.max_tokens=0", "greater than 0"]),
        ("rollout.decoder.threshold=0", ["threshold"]),
        ("rollout.decoder.threshold=1.1", ["threshold"]),
        ("rollout.decoder.temperature=0", ["greedy", "teach nothing"]),
        ("rollout.decoder.temperature=-1", ["temperature"]),
        ("value.enabled=true algo.preset=wd1", ["value.enabled=true", "algo.preset=wd1", "tracerl"]),
        ("data.task=jsonl", ["data.train=FILE"]),
        ("data.train=mine.jsonl", ["data.task=jsonl"]),
        ("data.curriculum=hard", ["did you mean easy_to_hard"]),
        ("algo.preset=random_mask algo.shrink=2", ["algo.shrink=2"]),
        ("value.enabled=true algo.ratio=sequence", ["algo.ratio=sequence", "algo.ratio=token"]),
        ("algo.clip_dual=1.1", ["algo.clip_dual=1.1", "1 + algo.clip_high=1.2"]),
        ("algo.score_by=forced algo.score_share=0.5", ["algo.score_share=0.5", "leave it 1"]),
        ("algo.score_share=0", ["algo.score_share=0", "greater than 0"]),
        ("algo.random_share=1.5", ["algo.random_share=1.5", "at most 1"]),
        ("algo.kl_mix=0", ["algo.kl_mix=0", "greater than 0"]),
        ("algo.preset=mdpo", ["algo.preset=mdpo", "full attention"]),
        ("rollout.decoder.edit=rcr", ["no step map", "algo.preset=tracerl", "espo"]),
        ("rollout.decoder.edit=rcr algo.preset=espo algo.score_share=0.5", ["score_share=1", "edit=none"]),
        ("eval.decoder.tempratur=1", ["eval.decoder.tempratur", "temperature"]),
        ("eval.decoder.temperature=hot", ["eval.decoder.temperature", "float"]),
        ("eval.decoder.select=none", ["eval.decoder.select=none", "threshold"]),
        ("seed=-1", ["seed=-1"]),
        ("rollout.timeout_s=0", ["rollout.timeout_s"]),
        ("learner.lr=nan", ["finite"]),
        ("algo.kl_coef=inf", ["finite"]),
        ("run_id=../other", ["run_id", "plain name"]),
    ],
)
def test_contradictions_are_refused_with_the_arithmetic(overrides, words):
    message = refused(["recipe=quickstart", *overrides.split()])
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("key", CHOICES)
def test_enumerated_settings_list_what_is_allowed(key):
    message = refused(["recipe=quickstart", f"{key}={CHOICES[key][-1]}x"])
    assert f"did you mean {CHOICES[key][-1]}?" in message
    assert all(name in message for name in CHOICES[key])


def test_enumerations_are_those_of_the_code():
    from rlpipe import contradictions
    from rlpipe.models.loading import DTYPES
    from rlpipe.models.tiny import KINDS, TINY_BLOCK_SIZE
    from rlpipe.objective_presets import ALGO_PRESETS
    from rlpipe.objectives.advantages import ADVANTAGES
    from rlpipe.objectives.losses import KL_ESTIMATORS
    from rlpipe.objectives.objective import KL_REFERENCES, PRESETS, SCORE_BY
    from rlpipe.objectives.reducers import KL_NORMALIZERS, NORMALIZERS
    from rlpipe.objectives.units import UNITS
    from rlpipe.sampling.caching import CACHES
    from rlpipe.sampling.decoder import FUSIONS, SELECTS, STOPS
    from rlpipe.sampling.editing import EDITORS
    from rlpipe.sampling.schedule import SCHEDULES
    from rlpipe.sampling.scoring import SCORERS

    assert set(CHOICES["model.dtype"]) == set(DTYPES)
    assert set(ALGO_PRESETS) == set(PRESETS)
    assert set(CHOICES["algo.advantage"]) == set(ADVANTAGES)
    assert set(CHOICES["algo.kl_estimator"]) == set(KL_ESTIMATORS)
    assert CHOICES["algo.ratio"] == UNITS and CHOICES["algo.score_by"] == SCORE_BY
    assert CHOICES["algo.kl_reference"] == KL_REFERENCES
    assert set(CHOICES["algo.normalizer"]) == set(NORMALIZERS)
    assert set(CHOICES["algo.kl_normalizer"]) == {"", *KL_NORMALIZERS}
    assert set(CHOICES["rollout.decoder.score"]) == set(SCORERS)
    assert CHOICES["rollout.decoder.schedule"] == SCHEDULES
    assert set(CHOICES["rollout.decoder.select"]) == set(SELECTS)
    assert set(CHOICES["rollout.decoder.fuse"]) == {"none", *FUSIONS}
    assert set(CHOICES["rollout.decoder.cache"]) == {"auto", *CACHES}
    assert set(CHOICES["rollout.decoder.edit"]) == {"none", *EDITORS}
    assert CHOICES["rollout.decoder.stop"] == STOPS
    assert {kind: TINY_BLOCK_SIZE * (a == "block") for kind, a in KINDS.items()} == contradictions.TINY_BLOCK_SIZE


def test_tables_of_bounds_name_existing_numbers():
    from rlpipe.contradictions import ABOVE_ZERO, AT_MOST, MAY_BE_NEGATIVE

    numbers = {key.name for key in schema.keys().values() if key.type in ("int", "float")}
    assert {*ABOVE_ZERO, *AT_MOST, *MAY_BE_NEGATIVE} <= numbers


def test_what_is_allowed_and_warned_about():
    assert "sampled_prob" in recipe.check(load("rollout.decoder.score=sampled_prob"))[0]
    assert "bfloat16" in recipe.check(load("model.dtype=bfloat16"))[0]
    assert "algo.shrink=4" in recipe.check(load("algo.shrink=4"))[0]
    recipe.check(load("value.enabled=true", "dry_run=true"))
    recipe.check(load("eval.decoder.temperature=0"))


def test_the_other_decoder_of_evaluations():
    decoder = recipe.decoder_of_eval(load("eval.decoder={select: threshold, threshold: 0.8, temperature: 0}"))
    assert (decoder.select, decoder.threshold, decoder.temperature, decoder.max_tokens) == ("threshold", 0.8, 0.0, 16)
    assert isinstance(decoder.temperature, float)


def test_unknown_keys_in_a_file_are_refused_with_file_and_line(tmp_path):
    path = write(tmp_path, "mine", "base: quickstart\n# a comment\nalgo:\n  epochs: 1\n  shrnk: 2\n")
    message = refused([f"recipe={path}"])
    assert f"{path}:5: there is no key algo.shrnk; did you mean algo.shrink" in message


def test_wrong_types_in_a_file_are_refused_with_file_and_line(tmp_path):
    path = write(tmp_path, "mine", "base: quickstart\nlearner:\n  lr: fast\n")
    assert f"{path}:3: learner.lr='fast'" in refused([f"recipe={path}"])
    base = write(tmp_path, "below", "base: quickstart\nsteps: many\n")
    above = write(tmp_path, "above", "base: below.yaml\nseed: 1\n")
    assert f"{base}:2: steps='many'" in refused([f"recipe={above}"])


@pytest.mark.parametrize("text", ["- 1\n", "a: [1\n", "seed: 1\nseed: 2\n", "just words\n"])
def test_files_that_are_no_recipe_are_refused_by_name(tmp_path, text):
    path = write(tmp_path, "broken", text)
    assert str(path) in refused([f"recipe={path}"])


def test_bases_are_merged_first_and_found_beside_the_file(tmp_path):
    write(tmp_path, "lower", "name: lower\ndescription: lower\nbase: quickstart\nalgo: {shrink: 2}\nseed: 5\n")
    cfg = recipe.load([f"recipe={write(tmp_path, 'upper', 'base: lower.yaml' + chr(10) + 'seed: 6')}", "steps=3"])
    assert (cfg.name, cfg.seed, cfg.steps, cfg.algo.shrink, cfg.description) == ("upper", 6, 3, 2, "lower")
    assert cfg.warm_start.steps == load().warm_start.steps


def test_bases_in_a_circle_are_refused(tmp_path):
    one = write(tmp_path, "one", "base: two.yaml\n")
    write(tmp_path, "two", "base: ./one.yaml\n")
    assert "circle" in refused([f"recipe={one}"])


def test_a_section_with_every_line_commented_out_is_empty(tmp_path):
    path = write(tmp_path, "mine", "base: quickstart\nlearner:\n  # lr: 1.0\nseed: 3\n")
    cfg = recipe.load([f"recipe={path}"])
    assert (cfg.seed, cfg.learner) == (3, load().learner)
    assert recipe.load([f"recipe={write(tmp_path, 'empty', '# nothing' + chr(10))}"]).steps == RunConfig().steps


def test_the_resolved_configuration_is_a_recipe_in_its_own_right(tmp_path):
    for name in SHIPPED:
        cfg = recipe.load([f"recipe={name}", "dry_run=true", "run_id=1e5"])
        path = write(tmp_path, "config", recipe.to_yaml(cfg))
        assert recipe.load([f"recipe={path}"]) == cfg


def test_the_fingerprint_covers_the_numbers_and_nothing_else():
    cfg = load()
    same = [
        "steps=90",
        "run_id=x",
        "resume=auto",
        "eval.every=1",
        "monitor.samples=1",
        "checkpoint.keep=9",
        "output_dir=x",
    ]
    same += ["cluster.start_timeout_s=9", "rollout.timeout_s=9", "rollout.workers=5", "verifier.retries=9", "name=x"]
    for override in same:
        assert recipe.fingerprint(load(override)) == recipe.fingerprint(cfg), override
        assert recipe.differences(cfg, load(override)) == []
    for override in [
        "seed=1",
        "algo.shrink=2",
        "learner.lr=1",
        "data.options.careless=0.1",
        "rollout.decoder.threshold=1.0",
    ]:
        assert recipe.fingerprint(load(override)) != recipe.fingerprint(cfg), override
    assert recipe.differences(cfg, load("learner.lr=0.5", "steps=1")) == [f"learner.lr: {cfg.learner.lr} → 0.5"]


def test_steps_count_where_the_learning_rate_is_stretched_over_them():
    linear = "learner.lr_schedule=linear"
    assert recipe.fingerprint(load(linear, "steps=8")) != recipe.fingerprint(load(linear, "steps=9"))
    assert recipe.differences(load(linear, "steps=8"), load(linear, "steps=9")) == ["steps: 8 → 9"]


def test_the_fingerprint_does_not_depend_on_the_process():
    code = "from rlpipe import recipe; print(recipe.fingerprint(recipe.load(['recipe=quickstart'])))"
    command = [sys.executable, "-c", code]
    prints = {
        subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert prints == {recipe.fingerprint(load()) + "\n"}


def test_every_key_is_documented_by_its_own_line():
    text = recipe.document()
    for key in schema.keys().values():
        assert f"  {key.name}: {key.type} = {key.default!r}" in text
    assert "merge every s denoising steps into one row" in text and "quickstart_full" in text
    assert set(schema.keys()) == set(schema.flat(RunConfig()))


def test_keys_keep_their_defaults():
    for name, value in schema.flatten(dataclasses.asdict(RunConfig())).items():
        assert schema.keys()[name].default == value


def test_another_task_drops_the_options_of_the_one_before():
    assert recipe.load(["recipe=quickstart", "data.task=reasoning_gym:chain_sum"]).data.options == {}
    kept = recipe.load(["recipe=quickstart", "data.options.clues_low=6"])
    assert kept.data.options == {"careless": 0.55, "clues_low": 6}


def test_a_named_decoder_lies_over_earlier_layers_and_under_the_keys_beside_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: quickstart_full\nrollout:\n  decoder: {preset: fast_dllm_dual, threshold: 0.8, max_tokens: 16}\n")
    decoder = recipe.load([f"recipe={path}"]).rollout.decoder
    assert (decoder.cache, decoder.select, decoder.threshold, decoder.block_size) == ("dual", "threshold", 0.8, 32)
    assert decoder.temperature == 1.0 and decoder.max_tokens == 16
    over = recipe.load([f"recipe={path}", "rollout.decoder.preset=eb_sampler"]).rollout.decoder
    assert (over.cache, over.select, over.options, over.threshold) == ("auto", "entropy_bounded", {"gamma": 0.35}, 0.9)
    kept = tmp_path / "kept.yaml"
    kept.write_text(recipe.to_yaml(recipe.load([f"recipe={path}"])))
    assert recipe.load([f"recipe={kept}"]).rollout.decoder == decoder, "a resolved configuration loads back as itself"
    with pytest.raises(ConfigError, match="did you mean fast_dllm_dual"):
        recipe.load([f"recipe={path}", "rollout.decoder.preset=fast_dlm_dual"])


def test_the_second_decoder_may_be_a_named_one():
    cfg = load("rollout.decoder={select: entropy_bounded, options: {gamma: 0.2}}")
    assert recipe.decoder_of_eval(cfg).options == {}, "the numbers of another selector do not travel"
    cfg = load("eval.decoder={preset: sdar_dynamic, temperature: 0.5}")
    second = recipe.decoder_of_eval(cfg)
    assert (second.threshold, second.score, second.temperature, second.max_tokens) == (0.85, "sampled_prob", 0.5, 16)


def test_what_the_learner_must_know_about_a_decoder_is_said():
    full = load("model.path=tiny:full", "rollout.decoder.preset=fast_dllm_dual", "rollout.decoder.block_size=8")
    assert any("truncated at algo.importance_cap=2" in warning for warning in recipe.check(full))
    with pytest.raises(ConfigError, match="no step map for algo.preset=tracerl"):
        recipe.check(load("rollout.decoder.preset=rcr_block"))
    assert recipe.check(load("rollout.decoder.preset=rcr_block", "algo.preset=random_mask")) is not None
    with pytest.raises(ConfigError, match="a block model has one"):
        recipe.check(load("eval.hex=[4,8]"))
