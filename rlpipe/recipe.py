"""Recipes: short YAML files over the typed schema of `rlpipe.config`, with dotted overrides. Nothing unknown gets through."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from rlpipe import config
from rlpipe.config import DecoderConfig, RunConfig
from rlpipe.errors import ConfigError

CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "rollout.decoder.select": ("static", "threshold"),
    "rollout.decoder.score": ("max_prob", "entropy", "margin", "random", "left_to_right", "sampled_prob"),
    "algo.advantage": ("zscore", "mean", "leave_one_out"),
    "algo.kl_estimator": ("k1", "k2", "k3"),
    "algo.normalizer": ("response_length", "row_mean", "sequence_mean", "token_mean", "constant"),
    "algo.kl_normalizer": ("", "response_length", "row_mean", "sequence_mean", "token_mean", "constant", "row_sum"),
    "algo.groups": ("keep", "drop", "refill"),
    "learner.lr_schedule": ("constant", "linear", "cosine"),
    "monitor.wandb": ("auto", "online", "offline", "disabled"),
}
POSITIVE = (
    "steps", "rollout.workers", "rollout.batch_size", "rollout.threads", "rollout.decoder.max_tokens",
    "rollout.decoder.tokens_per_step", "verifier.workers", "verifier.batch_size", "algo.prompts_per_step",
    "algo.samples_per_prompt", "algo.updates_per_step", "algo.epochs", "algo.shrink", "learner.workers", "learner.threads",
    "learner.token_budget", "learner.bucket_mb", "learner.lr", "eval.prompts", "eval.samples", "checkpoint.keep",
)  # fmt: skip
NOT_IN_THE_NUMBERS = ("run_id", "resume", "dry_run", "output_dir", "steps", "monitor", "cluster", "description", "eval", "checkpoint")


def load(arguments: list[str]) -> RunConfig:
    """`recipe=NAME|path.yaml key=value …` → RunConfig. Raises ConfigError: unknown recipe or key (with the nearest one), wrong
    type, malformed override. A recipe may name a `base` recipe, which is merged first."""
    from omegaconf import OmegaConf

    overrides = dict(_split(argument) for argument in arguments)
    if "recipe" not in overrides:
        raise ConfigError(f"say which recipe: recipe=NAME or recipe=path.yaml. Known: {', '.join(sorted(_known()))}")
    path = _find(overrides.pop("recipe"))
    merged = OmegaConf.structured(RunConfig)
    for layer in _layers(path, ()):
        merged = _merge(merged, layer, str(path))
    for key, value in overrides.items():
        merged = _merge(merged, OmegaConf.from_dotlist([f"{key}={value}"]), "command line")
    cfg = OmegaConf.to_object(merged)
    cfg.name = cfg.name or path.stem
    return cfg


def _split(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise ConfigError(f"'{argument}' is not key=value")
    return key, value


def _folders() -> list[Path]:
    """Where named recipes are looked for: ./recipes, the checkout's, the ones installed with the package."""
    here = Path(__file__).resolve().parent
    return [Path("recipes"), here.parent / "recipes", here / "recipes"]


def _known() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"recipe={name}: no such file")
    known = _known()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"recipe={name} is not known{hint} Known: {', '.join(sorted(known))}; or give a path ending in .yaml")
    return known[name]


def _layers(path: Path, seen: tuple[Path, ...]) -> list[Any]:
    """The recipe's bases, then the recipe itself."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    if path in seen:
        raise ConfigError(f"recipes build on each other in a circle: {' → '.join(p.stem for p in (*seen, path))}")
    try:
        layer = OmegaConf.create(path.read_text(encoding="utf8"))
    except (YAMLError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"{path} must hold keys and values")
    base = layer.pop("base", None)
    below = _layers(_find(base), (*seen, path)) if base else []
    return [*below, layer]


def _merge(cfg: Any, layer: Any, where: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = leaves(OmegaConf.to_container(cfg))
    sections = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    for key in leaves(OmegaConf.to_container(layer)):
        free = any(key.startswith(f"{k}.") for k in ("data.options", "eval.decoder"))
        if key not in known and key not in sections and not free:
            near = difflib.get_close_matches(key, [*known, *sections], n=3, cutoff=0.5)
            tail = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
            hint = f"; did you mean {' or '.join(dict.fromkeys(tail + near))}?" if near or tail else ""
            raise ConfigError(f"{where}: there is no key {key}{hint} (help=true lists all)")
    try:
        return OmegaConf.merge(cfg, layer)
    except OmegaConfBaseException as error:
        key = error.full_key or "?"
        raise ConfigError(f"{where}: {key}: {str(error).splitlines()[0]} ({comments().get(key, 'see help=true')})") from error


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; lists and empty dicts are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and name not in ("data.options", "eval.decoder"):
            flat |= leaves(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def flat(cfg: RunConfig) -> dict[str, Any]:
    return leaves(dataclasses.asdict(cfg))


def check(cfg: RunConfig) -> list[str]:
    """Refuse contradictions with ConfigError, before anything starts; returns warnings."""
    values = flat(cfg)
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            near = difflib.get_close_matches(str(values[key]), allowed, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{key}={values[key]} is not one of {', '.join(filter(None, allowed))}; did you mean {near}?")
    for key in POSITIVE:
        if not values[key] > 0:
            raise ConfigError(f"{key}={values[key]} must be greater than 0 ({comments().get(key, '')})")
    _check_batch(cfg)
    _check_decoder(cfg.rollout.decoder, cfg)
    _check_decoder(decoder_of_eval(cfg), cfg)
    if cfg.rollout.decoder.temperature == 0:
        raise ConfigError("rollout.decoder.temperature=0: greedy samples of a prompt are all equal and teach nothing")
    if len(cfg.learner.betas) != 2 or not 0 <= cfg.learner.zero_stage <= 3:
        raise ConfigError(f"learner.betas={cfg.learner.betas} needs two numbers and zero_stage={cfg.learner.zero_stage} 0 to 3")
    if cfg.data.task == "jsonl" and not (cfg.data.train and cfg.data.test):
        raise ConfigError("data.task=jsonl needs data.train=FILE and data.test=FILE")
    if cfg.value.enabled and not cfg.dry_run:
        raise ConfigError("value.enabled=true: value models are not in this version; set it to false, or dry_run=true to plan")
    return _warnings(cfg)


def _check_batch(cfg: RunConfig) -> None:
    algo = cfg.algo
    responses = algo.prompts_per_step * algo.samples_per_prompt
    if algo.samples_per_prompt < 2:
        raise ConfigError("algo.samples_per_prompt=1: a group needs at least 2 samples to be compared with each other")
    if responses % algo.updates_per_step:
        raise ConfigError(
            f"algo.updates_per_step={algo.updates_per_step} does not divide the {algo.prompts_per_step} × "
            f"{algo.samples_per_prompt} = {responses} responses of a step; make it a divisor of {responses}"
        )
    if cfg.rollout.batch_size % algo.samples_per_prompt:
        near = max(1, round(cfg.rollout.batch_size / algo.samples_per_prompt)) * algo.samples_per_prompt
        raise ConfigError(
            f"rollout.batch_size={cfg.rollout.batch_size} is not a multiple of algo.samples_per_prompt={algo.samples_per_prompt}; "
            f"the samples of a prompt are drawn together, so use {near}"
        )
    if not algo.accuracy_low < algo.accuracy_high:
        raise ConfigError(f"algo.accuracy_low={algo.accuracy_low} must be below accuracy_high={algo.accuracy_high}")


def _check_decoder(decoder: DecoderConfig, cfg: RunConfig) -> None:
    if not 0 < decoder.threshold <= 1:
        raise ConfigError(f"decoder.threshold={decoder.threshold} is a probability: above 0, at most 1")
    if decoder.temperature < 0:
        raise ConfigError(f"decoder.temperature={decoder.temperature} must not be negative")
    grid = cfg.model.block_size or (4 if cfg.model.path == "tiny:block" else 0)
    if grid and decoder.block_size not in (0, grid):
        raise ConfigError(f"decoder.block_size={decoder.block_size}, but the model attends in blocks of {grid}; leave it 0")
    if grid and decoder.tokens_per_step > grid:
        raise ConfigError(f"decoder.tokens_per_step={decoder.tokens_per_step} is more than a block of {grid} holds")


def _warnings(cfg: RunConfig) -> list[str]:
    found = []
    if cfg.rollout.decoder.score == "sampled_prob":
        found.append("rollout.decoder.score=sampled_prob: positions depend on the draws, so token ratios are only part of the likelihood")
    if cfg.model.dtype == "bfloat16" and not cfg.learner.gpus:
        found.append("model.dtype=bfloat16 without GPUs: 50 to 90 times slower than float32 on most CPUs")
    return found


def decoder_of_eval(cfg: RunConfig) -> DecoderConfig:
    """The second decoder of evaluations: the rollout's own with the changes of `eval.decoder`."""
    names = {field.name for field in dataclasses.fields(DecoderConfig)}
    for key in cfg.eval.decoder:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise ConfigError(f"eval.decoder.{key}: a decoder has no such setting; did you mean {near}?")
    return dataclasses.replace(cfg.rollout.decoder, **cfg.eval.decoder)


def to_yaml(cfg: RunConfig) -> str:
    """The resolved configuration; loads back as a recipe."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _numbers(cfg: RunConfig) -> dict[str, Any]:
    return {k: v for k, v in flat(cfg).items() if k.split(".")[0] not in NOT_IN_THE_NUMBERS}


def fingerprint(cfg: RunConfig) -> str:
    """Hash of everything that affects a run's numbers."""
    return hashlib.sha256(json.dumps(_numbers(cfg), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs among the settings that affect a run's numbers: 'key: old → new'."""
    before, after = _numbers(old), _numbers(new)
    keys = [*before, *(k for k in after if k not in before)]
    return [f"{k}: {before.get(k)} → {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def comments() -> dict[str, str]:
    """Dotted key → its comment in the schema's source."""
    source = inspect.getsource(config)
    lines = source.splitlines()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

    def walk(name: str, prefix: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for node in classes[name].body:
            if isinstance(node, ast.AnnAssign):
                key, kind = f"{prefix}{node.target.id}", ast.unparse(node.annotation)
                if kind in classes:
                    found |= walk(kind, f"{key}.")
                else:
                    found[key] = lines[node.lineno - 1].partition("  # ")[2]
        return found

    return walk("RunConfig", "")


def document() -> str:
    """All keys with their defaults and comments, for `help=true`."""
    described = comments()
    rows = [f"  {key} = {value!r}".ljust(52) + described.get(key, "") for key, value in flat(RunConfig()).items()]
    return "\n".join(["python -m rlpipe.run recipe=NAME [key=value …]", f"recipes: {', '.join(sorted(_known()))}", *rows])
