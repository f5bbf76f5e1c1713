"""Prompt sources by name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlpipe.config import DataConfig, RunConfig
from rlpipe.data.benchmarks import BENCHMARKS
from rlpipe.data.countdown import Countdown
from rlpipe.data.mixture import Component, Mixture
from rlpipe.data.model_files import ModelFiles
from rlpipe.data.record_tasks import FILES, record_source
from rlpipe.data.source import PromptSource
from rlpipe.data.sudoku import Sudoku
from rlpipe.data.templated import Templated
from rlpipe.data.templates import resolve
from rlpipe.errors import ConfigError, DataError

log = logging.getLogger("rlpipe")

PROCEDURAL: dict[str, Callable[..., PromptSource]] = {"sudoku": Sudoku, "countdown": Countdown}
GYM = "reasoning_gym:"
OF_RECORDS = ("train", "test", "format", "max_prompt_chars", "max_prompt_tokens", "pass_rates", "difficulty", "curriculum")
OF_A_COMPONENT = ("task", "options", "template", "bad_records", *OF_RECORDS)  # settings that a part of a mixture may have


def source_of(cfg: RunConfig, *, training: bool = True) -> PromptSource:
    """The prompt source of a run: see `build_source`."""
    return build_source(cfg.data, cfg.seed, cfg.model.path, cfg.model.revision, training=training)


def build_source(cfg: DataConfig, seed: int, model: str = "", revision: str = "", *, training: bool = True) -> PromptSource:
    """The recipe's prompt source. model, revision: `model.path` and `model.revision`, for chat templates and token counts ·
    training: False leaves training records unread, where held-out ones lie apart.

    Raises ConfigError for an unknown task, option or template, DataError for unusable files.
    """
    files = ModelFiles(model, revision)
    source = _mixture(cfg, seed, files, training) if cfg.mixture else _single(cfg, seed, files, training)
    for line in (line for report in source.reports if report.dropped for line in report.lines()):
        log.warning("%s", line)
    return source


def _single(cfg: DataConfig, seed: int, files: ModelFiles, training: bool) -> PromptSource:
    if cfg.task in BENCHMARKS or cfg.task in FILES:
        return record_source(cfg, seed, files, training)
    for name in OF_RECORDS:
        if getattr(cfg, name) != getattr(DataConfig(), name):
            raise ConfigError(f"data.{name}={getattr(cfg, name)}: task {cfg.task} makes its prompts up; this is for records")
    template = resolve(cfg.template or "{prompt}", files)
    source = _procedural(cfg, seed)
    return source if template.is_plain else Templated(source, template)


def _procedural(cfg: DataConfig, seed: int) -> PromptSource:
    if cfg.task.startswith(GYM):
        from rlpipe.data.reasoning_gym import ReasoningGym

        names = cfg.task.removeprefix(GYM).split("+")
        if len(names) == 1:
            return ReasoningGym(names[0], seed, **cfg.options)
        for name, options in cfg.options.items():
            if name not in names or not isinstance(options, Mapping):
                raise ConfigError(
                    f"data.options.{name}: for several tasks, {{TASK: {{…}}}} with TASK one of {', '.join(names)}"
                )
        parts = [Component(name, ReasoningGym(name, seed, **cfg.options.get(name, {})), 1.0) for name in names]
        return Mixture(parts)
    if cfg.task in PROCEDURAL:
        maker = PROCEDURAL[cfg.task]
        _check_options(cfg.task, maker, cfg.options)
        return maker(seed, **cfg.options)
    known = [*PROCEDURAL, *BENCHMARKS, *FILES, f"{GYM}NAME"]
    near = difflib.get_close_matches(cfg.task, known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"data.task={cfg.task} is not one of {', '.join(known)}; did you mean {near}?")


def _check_options(task: str, maker: Callable[..., PromptSource], options: dict[str, Any]) -> None:
    known = [name for name, p in inspect.signature(maker).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"data.options.{name}: task {task} has no such option; did you mean {near}? ({', '.join(known)})")


def _mixture(cfg: DataConfig, seed: int, files: ModelFiles, training: bool) -> PromptSource:
    """Every entry of `data.mixture` is a part with settings of its own; those it leaves out are the recipe's."""
    parts, labels = [], Counter()
    for number, entry in enumerate(cfg.mixture):
        place = f"data.mixture[{number}]"
        known = ("name", "weight", "verifier", *OF_A_COMPONENT)
        for key in entry:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise ConfigError(f"{place}.{key}: a part of a mixture has no such setting; did you mean {near}?")
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ConfigError(f"{place}.weight={weight!r}: a number above 0")
        if "task" not in entry:
            raise ConfigError(f"{place} has no task; give each part one, for example {{task: gsm8k, weight: 2}}")
        settings = {key: value for key, value in entry.items() if key in OF_A_COMPONENT}
        of_records = entry["task"] in BENCHMARKS or entry["task"] in FILES
        own: dict[str, Any] = {"mixture": [], "train": "", "test": "", "options": {}}
        own |= {} if of_records else {name: getattr(DataConfig(), name) for name in OF_RECORDS}
        part = dataclasses.replace(cfg, **(own | _plain(place, settings)))
        name = str(entry.get("name") or entry["task"])
        labels[name] += 1
        name += f"-{labels[name]}" if labels[name] > 1 else ""
        try:
            parts.append(Component(name, _single(part, seed, files, training), float(weight), str(entry.get("verifier") or "")))
        except (ConfigError, DataError) as error:
            raise type(error)(f"{place} ({name}): {error}") from error
    return Mixture(parts)


def _plain(place: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a part, of the types that the recipe's own have."""
    defaults = DataConfig()
    for key, value in settings.items():
        wanted = type(getattr(defaults, key))
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ConfigError(f"{place}.{key}={value!r}: expected a value like data.{key} has ({wanted.__name__})")
    return dict(settings)


def check_block_sizes(source: PromptSource, block_size: int | None, model: str) -> None:
    """Raises ConfigError if prompts ask for block sizes that the model cannot have. block_size: of its attention, 0 for full
    attention, None if unknown."""
    unfit: Sequence[int] = [size for size in source.block_sizes if block_size and size != block_size]
    if unfit:
        raise ConfigError(
            f"records of task {source.task} ask for blocks of {', '.join(map(str, unfit))}, and {model} attends in blocks of "
            f"{block_size}: only a model with full attention can decode each prompt in blocks of its own; drop the field "
            "block_size, or set model.block_size"
        )
