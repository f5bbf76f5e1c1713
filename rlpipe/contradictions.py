"""What a configuration must not say: refused before anything starts, with the arithmetic and the remedy."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlpipe.config import DecoderConfig, RunConfig
from rlpipe.decoder_presets import preset_settings
from rlpipe.errors import ConfigError
from rlpipe.model_shapes import PUBLISHED, block_of, declared
from rlpipe.objective_presets import WITHOUT_STEP_MAP, algo_settings
from rlpipe.overlap_rules import check_overlap
from rlpipe.placement_rules import check_placement
from rlpipe.schema import flat, keys
from rlpipe.server_settings import check_servers

TINY_BLOCK_SIZE = {"tiny:block": 4, "tiny:full": 0}
CONVERT, CONVERTED_BLOCK_SIZE = "convert:", 4  # model.path=convert:SOURCE, a causal LM made a block diffusion LM
CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("", "block", "full"),
    "rollout.decoder.schedule": ("tokens", "even", "dream", "doubling", "linear", "cosine", "pow", "log", "exp"),
    "rollout.decoder.select": (
        "static", "threshold", "factor", "entropy_bounded", "local_leap", "hierarchical", "block_adaptive", "bernoulli",
        "prophet", "stable", "guided",
    ),
    "rollout.decoder.score": ("max_prob", "entropy", "margin", "random", "left_to_right", "sampled_prob"),
    "rollout.decoder.confidence": ("model", "sampler"),
    "rollout.decoder.fuse": ("none", "credit"),
    "rollout.decoder.cache": ("auto", "none", "block", "prefix", "dual", "vicinity", "every", "dkv_decode", "dkv_greedy"),
    "rollout.decoder.edit": ("none", "rcr", "wino", "remdm"),
    "rollout.decoder.stop": ("auto", "block", "prefix", "eotp", "length"),
    "algo.advantage": ("zscore", "mean", "leave_one_out", "softmax"),
    "algo.ratio": ("token", "position", "step", "sequence"),
    "algo.kl_estimator": ("k1", "k2", "k3"),
    "algo.kl_reference": ("old", "initial", "lagged"),
    "algo.score_by": ("confidence", "forced"),
    "algo.normalizer": (
        "response_length", "row_mean", "step_mean", "step_sum", "sequence_mean", "response_sum", "token_mean", "length_mean",
        "weight_mean", "constant",
    ),
    "algo.kl_normalizer": (
        "", "response_length", "row_mean", "step_mean", "step_sum", "sequence_mean", "response_sum", "token_mean",
        "length_mean", "weight_mean", "constant", "row_sum", "length_sum",
    ),
    "algo.groups": ("keep", "drop", "refill"),
    "algo.overlong": ("score", "zero", "drop", "soft"),
    "mode": ("sync", "async"),
    "rollout.order": ("in_order", "freshest"),
    "rollout.transport": ("auto", "store", "broadcast", "shared"),
    "data.bad_records": ("refuse", "skip"),
    "data.curriculum": ("none", "easy_to_hard", "target"),
    "verifier.sandbox": ("auto", "strict", "weak"),
    "learner.lr_schedule": ("constant", "linear", "cosine"),
    "sft.objective": ("random_mask", "block", "trace", "certainty"),
    "monitor.wandb": ("auto", "online", "offline", "disabled"),
}  # fmt: skip
ABOVE_ZERO = (
    "model.layers", "model.width", "model.heads", "model.mlp", "warm_start.batch_size", "warm_start.lr", "steps",
    "sft.batch_size", "rollout.workers", "rollout.threads", "rollout.batch_size", "rollout.timeout_s",
    "rollout.decoder.max_tokens", "rollout.decoder.tokens_per_step", "verifier.workers", "verifier.batch_size",
    "verifier.timeout_s", "algo.prompts_per_step", "algo.samples_per_prompt", "algo.shrink", "algo.updates_per_step",
    "algo.epochs", "algo.kl_lag", "algo.kl_mix", "algo.score_share",
    "algo.importance_cap", "learner.workers", "learner.threads", "learner.lr", "learner.eps", "learner.token_budget",
    "learner.bucket_mb", "learner.timeout_s", "value.lr", "value.clip", "eval.prompts", "eval.samples", "checkpoint.keep",
    "cluster.object_store_mb", "cluster.start_timeout_s",
    "judge.start_timeout_s", "guide.start_timeout_s",
)  # fmt: skip
MAY_BE_NEGATIVE = ("algo.accuracy_low", "algo.accuracy_high", "model.mask_token_id")  # rewards need not lie in [0, 1]
AT_MOST = {
    "rollout.decoder.threshold": 1.0, "rollout.decoder.eos_gamma": 1.0,
    "verifier.max_failed_groups": 1.0, "algo.clip_low": 1.0, "algo.kl_mix": 1.0, "algo.random_share": 1.0,
    "algo.score_share": 1.0, "learner.zero_stage": 3,
    "value.gamma": 1.0, "value.lam": 1.0, "value.gate": 1.0, "learner.lora_dropout": 1.0,
}  # fmt: skip


def check(cfg: RunConfig) -> list[str]:
    """Warnings, or ConfigError for the first contradiction."""
    check_settings(flat(cfg))
    _check_names(cfg)
    algo_settings(cfg.algo.preset)  # refuses an unknown name
    _check_batch(cfg)
    _check_model(cfg)
    for name, decoder in (("rollout.decoder", cfg.rollout.decoder), ("eval.decoder", decoder_of_eval(cfg))):
        check_decoder(name, decoder, block_size(cfg))
        if decoder.select == "guided" and not (cfg.guide.url or cfg.guide.model):
            raise ConfigError(
                f"{name}.select=guided: no guide reads the drafts; set guide.url=http://HOST:8000/v1 of a server that is "
                "there, or guide.model=FOLDER to start one"
            )
    if cfg.rollout.decoder.select == "guided" and cfg.rollout.decoder.options.get("correct"):
        raise ConfigError(
            "rollout.decoder.options.correct=true: the guide writes the text, so the samples of a prompt are alike and teach "
            "the policy nothing; set correct=false (rollout.decoder.preset=freecache_guided), and keep it for eval.decoder"
        )
    if cfg.eval.hex and (block_size(cfg) or min(cfg.eval.hex) < 1):
        raise ConfigError(
            f"eval.hex={cfg.eval.hex}: block lengths of at least 1, for a model with full attention; a block model has one"
        )
    if cfg.rollout.decoder.temperature == 0:
        raise ConfigError("rollout.decoder.temperature=0: greedy samples of a prompt are all equal and teach nothing")
    _check_algo(cfg)
    _check_learner(cfg)
    _check_data(cfg)
    _check_value(cfg)
    check_placement(cfg)
    check_servers(cfg)
    return check_overlap(cfg) + _warnings(cfg)


VALUED = ("tracerl", "dipo", "cj_grpo")  # methods whose rows replay a rollout, each token in one row
INEXACT = (("cache", ("auto", "none", "block")), ("fuse", ("none",)), ("top_p", (1.0,)), ("top_k", (0,)))
PIECES = ("schedule", "select", "score", "confidence", "fuse", "cache", "edit", "stop")


def decoder_of_eval(cfg: RunConfig) -> DecoderConfig:
    """The second decoder of evaluations: the rollout's own with the changes of `eval.decoder`."""
    return decoder_with(cfg.rollout.decoder, cfg.eval.decoder, "eval.decoder")


def decoder_with(base: DecoderConfig, wanted: Mapping[str, Any], name: str) -> DecoderConfig:
    """`base` with changes; if they name a preset, it replaces all but what stays the recipe's own. name: of the changes, for
    messages. Raises ConfigError for a setting that decoders do not have, or of another type."""
    changes: dict[str, Any] = {}
    known = {field.name: type(getattr(base, field.name)) for field in dataclasses.fields(DecoderConfig)}
    for key, value in wanted.items():
        if key not in known:
            raise ConfigError(f"{name}.{key}: a decoder has no such setting; did you mean {_nearest(key, [*known])}?")
        kind = known[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{name}.{key}={value!r}: expected {keys()[f'rollout.decoder.{key}']}")
        changes[key] = value
    if changes.get("preset"):
        named = preset_settings(changes["preset"])
        changes = named | changes | {"options": named["options"] | changes.get("options", {})}
    elif any(changes[piece] != getattr(base, piece) for piece in PIECES if piece in changes):
        changes.setdefault("options", {})  # they are numbers of pieces, and these are others
    decoder = dataclasses.replace(base, **changes)
    for key in PIECES:
        _check_choice(f"{name}.{key}", getattr(decoder, key), CHOICES[f"rollout.decoder.{key}"])
    return decoder


def block_size(cfg: RunConfig) -> int | None:
    """The model's attention block: 0 for full attention, None for a folder or hub id that does not say (yet)."""
    if cfg.model.path in TINY_BLOCK_SIZE:
        native = TINY_BLOCK_SIZE[cfg.model.path]
        return native and (cfg.model.block_size or native)
    if cfg.model.path.startswith(CONVERT):
        return cfg.model.block_size or CONVERTED_BLOCK_SIZE
    model = cfg.model
    if model.attention == "full":
        return 0
    said = declared(model.path, model.revision)
    native = None if said is None else block_of(said)
    if native is None and model.path in PUBLISHED:
        native = PUBLISHED[model.path].block
    if native == 0 and model.attention != "block":
        return 0
    return model.block_size or native


def _nearest(value: Any, allowed: Sequence[str]) -> str:
    return difflib.get_close_matches(str(value), [name for name in allowed if name], n=1, cutoff=0.0)[0]


def _check_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        listed = ", ".join(name or "(empty)" for name in allowed)
        raise ConfigError(f"{key}={value} is not one of {listed}; did you mean {_nearest(value, allowed)}?")


def check_settings(values: Mapping[str, Any]) -> None:
    """ConfigError unless every setting is one of its choices and inside its bounds. values: by dotted key; those of a run, or
    the sections that another command shares with it."""
    for key, allowed in CHOICES.items():
        if key in values:
            _check_choice(key, values[key], allowed)
    for key, value in values.items():
        _check_bounds(key, value, key)


def _check_bounds(shown: str, value: Any, key: str) -> None:
    """A number is finite, and above 0 or at least 0 by the tables above. shown: what messages call it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ConfigError(f"{shown}={value} is not a finite number: {keys()[key]}")
    if key in ABOVE_ZERO and not value > 0:
        raise ConfigError(f"{shown}={value} must be greater than 0: {keys()[key]}")
    if value < 0 and key not in MAY_BE_NEGATIVE:
        raise ConfigError(f"{shown}={value} must not be negative: {keys()[key]}")
    if key in AT_MOST and value > AT_MOST[key]:
        raise ConfigError(f"{shown}={value} must be at most {AT_MOST[key]:g}: {keys()[key]}")


def _check_names(cfg: RunConfig) -> None:
    """Recipe and run name folders below `output_dir`."""
    for key, value in (("name", cfg.name), ("run_id", cfg.run_id)):
        if value in (".", "..", "latest", "cache") or any(character in value for character in "/\\\0"):
            raise ConfigError(f"{key}={value!r} names a folder below output_dir={cfg.output_dir}; use a plain name")


def _check_batch(cfg: RunConfig) -> None:
    algo, learner = cfg.algo, cfg.learner
    responses = algo.prompts_per_step * algo.samples_per_prompt
    if algo.samples_per_prompt < 2:
        raise ConfigError("algo.samples_per_prompt=1: a group needs at least 2 samples to be compared with each other")
    if responses % algo.updates_per_step:
        raise ConfigError(
            f"algo.updates_per_step={algo.updates_per_step} does not divide the {algo.prompts_per_step} × "
            f"{algo.samples_per_prompt} = {responses} responses of a step; make it a divisor of {responses}"
        )
    if responses // algo.updates_per_step < learner.workers:
        raise ConfigError(
            f"an update of {responses} / {algo.updates_per_step} = {responses // algo.updates_per_step} responses "
            f"cannot occupy learner.workers={learner.workers}; use fewer ranks or updates, or more prompts"
        )
    if cfg.rollout.batch_size % algo.samples_per_prompt:
        near = max(1, round(cfg.rollout.batch_size / algo.samples_per_prompt)) * algo.samples_per_prompt
        raise ConfigError(
            f"rollout.batch_size={cfg.rollout.batch_size} is not a multiple of algo.samples_per_prompt="
            f"{algo.samples_per_prompt}; the samples of a prompt are drawn together, so use {near}"
        )
    if not algo.accuracy_low < algo.accuracy_high:
        raise ConfigError(
            f"algo.accuracy_low={algo.accuracy_low} must be below algo.accuracy_high={algo.accuracy_high}; a group has "
            "signal if its mean reward lies between them"
        )
    if algo.shrink > 1 and algo.preset not in ("tracerl", "dipo", "cj_grpo"):
        raise ConfigError(f"algo.shrink={algo.shrink}: preset {algo.preset} replays no steps that could be merged; leave it 1")


def _check_algo(cfg: RunConfig) -> None:
    algo, edit = cfg.algo, cfg.rollout.decoder.edit
    if algo.clip_dual and algo.clip_dual <= 1 + algo.clip_high:
        raise ConfigError(
            f"algo.clip_dual={algo.clip_dual} must be above 1 + algo.clip_high={1 + algo.clip_high:g}, so that it bounds what "
            "clipping leaves; 3 is usual, 0 switches it off"
        )
    if algo.score_by == "forced" and algo.score_share < 1:
        raise ConfigError(f"algo.score_share={algo.score_share}: algo.score_by=forced scores all forced tokens; leave it 1")
    if cfg.value.enabled and algo.ratio != "token":
        raise ConfigError(
            f"algo.ratio={algo.ratio}: a value model gives every token an advantage of its own; set algo.ratio=token"
        )
    if algo.preset == "mdpo" and block_size(cfg):
        raise ConfigError(
            f"algo.preset=mdpo scores what the model predicts of a whole answer at every step, and {cfg.model.path} sees one "
            "block at a time; use a model with full attention"
        )
    if algo.preset == "mdpo" and cfg.rollout.decoder.cache not in ("auto", "none"):
        raise ConfigError(
            f"rollout.decoder.cache={cfg.rollout.decoder.cache}: algo.preset=mdpo reads a prediction of every position at each "
            "step, and a cache leaves some out; use cache=none"
        )
    stepwise = algo.preset == "mdpo" or (cfg.value.enabled and cfg.value.step_rewards)
    if algo.overlong != "score" and stepwise:
        raise ConfigError(
            f"algo.overlong={algo.overlong} changes the reward of whole responses, and here every step's prediction has its "
            "own (algo.preset=mdpo or value.step_rewards=true); leave it score, or take verifier.parts with length"
        )
    if algo.overlong_buffer > cfg.rollout.decoder.max_tokens:
        raise ConfigError(
            f"algo.overlong_buffer={algo.overlong_buffer} is more than rollout.decoder.max_tokens="
            f"{cfg.rollout.decoder.max_tokens}, the whole budget"
        )
    if edit == "none":
        return
    if algo.preset not in WITHOUT_STEP_MAP and ":" not in algo.preset:
        raise ConfigError(
            f"rollout.decoder.edit={edit}: tokens that are taken back leave no step map for algo.preset={algo.preset} to use; "
            f"take an objective that needs none ({', '.join(WITHOUT_STEP_MAP)}), or edit=none"
        )
    if algo.score_share < 1 or algo.score_by == "forced":
        raise ConfigError(
            f"rollout.decoder.edit={edit}: a token that is taken back has no one confidence to choose it by; set "
            "algo.score_share=1 and score_by=confidence, or edit=none"
        )


def _check_model(cfg: RunConfig) -> None:
    model = cfg.model
    if model.path.startswith("tiny:") and model.path not in TINY_BLOCK_SIZE:
        _check_choice("model.path", model.path, tuple(TINY_BLOCK_SIZE))
    if model.path in TINY_BLOCK_SIZE and (model.width % model.heads or model.width // model.heads % 2):
        raise ConfigError(
            f"model.width={model.width} / model.heads={model.heads} = {model.width / model.heads:g}; a head needs an "
            f"even whole width, so use model.width={2 * model.heads * max(1, round(model.width / model.heads / 2))}"
        )
    if model.block_size and block_size(cfg) == 0:
        raise ConfigError(
            f"model.block_size={model.block_size}, but {model.path} has full attention; leave it 0, or give the model a grid "
            "with model.attention=block"
        )
    if model.attention and model.path in TINY_BLOCK_SIZE:
        raise ConfigError(f"model.attention={model.attention}: {model.path} says it already; choose tiny:block or tiny:full")
    if model.attention == "block" and not block_size(cfg):
        raise ConfigError("model.attention=block gives this model a grid: say which with model.block_size, for example 4")


def check_decoder(name: str, decoder: DecoderConfig, grid: int | None) -> None:
    """ConfigError for numbers out of bounds, or of another grid than the model's. name: of the decoder, for messages ·
    grid: the model's block, 0 for full attention, None if unknown."""
    if not 0 < decoder.threshold <= 1:
        raise ConfigError(f"{name}.threshold={decoder.threshold} is a probability: above 0, at most 1")
    if not 0 <= decoder.temperature < math.inf:
        raise ConfigError(f"{name}.temperature={decoder.temperature} must be a number of at least 0 (0: greedy)")
    if min(decoder.max_tokens, decoder.tokens_per_step) < 1 or decoder.block_size < 0:
        raise ConfigError(f"{name}: max_tokens and tokens_per_step must be at least 1, block_size at least 0")
    if not 0 < decoder.top_p <= 1 or decoder.top_k < 0:
        raise ConfigError(f"{name}: top_p must be above 0 and at most 1, top_k at least 0 (0: off)")
    for key, value in dataclasses.asdict(decoder).items():
        _check_bounds(f"{name}.{key}", value, f"rollout.decoder.{key}")
    if grid and decoder.block_size not in (0, grid):
        raise ConfigError(
            f"{name}.block_size={decoder.block_size}, but the model attends in blocks of {grid}; leave it 0, or set "
            "model.block_size to adapt the model"
        )
    room = grid or decoder.block_size or decoder.max_tokens
    if decoder.tokens_per_step > room:
        raise ConfigError(f"{name}.tokens_per_step={decoder.tokens_per_step} is more than a block of {room} tokens holds")


def _check_learner(cfg: RunConfig) -> None:
    learner = cfg.learner
    if len(learner.betas) != 2 or not all(0 <= beta < 1 for beta in learner.betas):
        raise ConfigError(f"learner.betas={learner.betas}: two numbers of at least 0 and below 1, for example [0.9, 0.999]")
    if learner.offload and not learner.zero_stage:
        raise ConfigError("learner.offload=true needs learner.zero_stage of 1 to 3; stage 0 has nothing to move")
    for key, gpus, workers in (("rollout", cfg.rollout.gpus, 1), ("learner", learner.gpus, learner.workers)):
        if gpus % 1 and (gpus > 1 or workers > 1):
            reason = "two ranks on one GPU cannot form a group" if gpus < 1 else "Ray gives out whole GPUs above 1"
            raise ConfigError(f"{key}.gpus={gpus:g}: {reason}; use {max(1, round(gpus))}, or 0 for CPUs")


def _check_value(cfg: RunConfig) -> None:
    if cfg.value.enabled and cfg.algo.preset not in VALUED and ":" not in cfg.algo.preset:
        raise ConfigError(
            f"value.enabled=true: algo.preset={cfg.algo.preset} does not score each token of a rollout once, so a token has no "
            f"single value; use {' or '.join(VALUED)}"
        )
    if cfg.value.enabled and cfg.algo.redraw and cfg.algo.epochs > 1:
        raise ConfigError("value.enabled=true and algo.redraw=true: values are of rows that stay; set algo.redraw=false")
    stepwise = cfg.value.enabled and cfg.value.step_rewards
    if stepwise and (block_size(cfg) or cfg.rollout.decoder.cache not in ("auto", "none")):
        raise ConfigError(
            "value.step_rewards=true needs a prediction of the whole answer at every step: a model with full attention and "
            "rollout.decoder.cache=none"
        )


def _check_data(cfg: RunConfig) -> None:
    data = cfg.data
    if data.mixture:
        given = [name for name in ("train", "test", "options") if getattr(data, name)]
        if given:
            raise ConfigError(f"data.{given[0]} and data.mixture: a mixture has it in its parts, as {{task: …, {given[0]}: …}}")
        if cfg.verifier.name:
            raise ConfigError(
                f"verifier.name={cfg.verifier.name} and data.mixture: each part has its own verifier; name another one "
                "there, as {task: …, verifier: …}"
            )
    elif data.task in ("jsonl", "records"):
        if not (data.train and data.test):
            raise ConfigError(f"data.task={data.task} needs data.train=FILE and data.test=FILE (or data.test=held_out)")
    elif (data.train or data.test) and (data.task in ("sudoku", "countdown") or ":" in data.task):
        raise ConfigError(f"data.train and data.test are read by data.task=jsonl or records, and data.task is {data.task}")


def _warnings(cfg: RunConfig) -> list[str]:
    found, decoder, grid = [], cfg.rollout.decoder, block_size(cfg)
    if decoder.score == "sampled_prob":
        found.append(
            "rollout.decoder.score=sampled_prob: positions depend on the draws, so token ratios are only part of the likelihood"
        )
    changed = [key for key, off in INEXACT if getattr(decoder, key) not in off]
    if changed:
        found.append(
            f"rollout.decoder.{', '.join(changed)}: the sampler's distribution is not the learner's, so tokens are weighed by "
            f"importance ratios truncated at algo.importance_cap={cfg.algo.importance_cap:g}"
        )
    if cfg.model.dtype == "bfloat16" and not (cfg.learner.gpus and cfg.rollout.gpus):
        found.append("model.dtype=bfloat16 without GPUs: 50 to 90 times slower than float32 on most CPUs")
    steps = math.ceil((grid or decoder.max_tokens) / decoder.tokens_per_step)
    if grid is not None and 1 < steps <= cfg.algo.shrink:
        found.append(
            f"algo.shrink={cfg.algo.shrink} merges all {steps} steps of a {'block' if grid else 'canvas'} into one "
            "row: the order of decoding no longer matters to the update"
        )
    return found
