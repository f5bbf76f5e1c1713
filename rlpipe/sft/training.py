"""A supervised run from its recipe to its summary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpipe.config import RunConfig
from rlpipe.errors import ConfigError
from rlpipe.schema import flat

CONSOLE = (  # title, metric, format, style
    ("loss", "sft/loss", ".4f", "bold"), ("held out", "eval/loss", ".4f", "bold green"), ("entropy", "sft/entropy", ".3f", ""),
    ("certainty", "sft/certainty", ".4f", ""), ("grad", "sft/grad_norm", ".3g", ""), ("lr", "sft/lr", ".1e", ""),
    ("tok/s", "perf/update_tokens_per_s", ".0f", ""), ("s/step", "perf/step_s", ".2f", ""),
)  # fmt: skip


def run(arguments: list[str]) -> int:
    """Check everything, then train; returns the process's exit code."""
    from rlpipe import recipe
    from rlpipe.data.registry import source_of
    from rlpipe.run import check_model, finished, run_folder, without_links

    if {"help=true", "--help", "-h"} & set(arguments):
        print(recipe.document().replace("rlpipe.run", "rlpipe.sft", 1))
        return 0
    cfg = without_links(recipe.load(arguments))
    warnings = recipe.check(cfg) + check(cfg)
    if cfg.dry_run:
        from rlpipe.sft.plan import describe

        print(describe(cfg))
        for warning in warnings:
            print(f"warning: {warning}")
        return 0
    from rlpipe.warm_start import initial_model, with_converted_model

    check_model(cfg)
    source = source_of(with_converted_model(cfg))  # templates and token counts may need the model's folder
    examples = None
    if cfg.sft.epochs:
        examples = _examples(cfg, source, initial_model(cfg, source))
        cfg = with_epochs(cfg, examples.size)
    run_dir, resume_from = run_folder(cfg)
    if resume_from is not None and finished(cfg, resume_from):
        print(f"{run_dir} is finished (step {cfg.steps}); raise steps= to train on, or give resume=never to start anew")
        return 0
    return train(cfg, source, run_dir, resume_from, warnings, examples)


def check(cfg: RunConfig) -> list[str]:
    """Warnings, or ConfigError for what supervised training cannot do."""
    from rlpipe.sft.driver import learner_config

    if cfg.sft.objective == "trace" and not cfg.sft.trajectories:
        raise ConfigError(
            "sft.objective=trace learns the states of recorded trajectories: say where they are with sft.trajectories=FILE; "
            "python -m rlpipe.sft collect records some"
        )
    learner_config(cfg)
    said = flat(cfg).items()
    ignored = [key for key, value in said if key.startswith(("algo.", "value.")) and value != DEFAULTS[key]]
    warnings = [f"{', '.join(ignored)}: choices of RL, which supervised training does not heed"] if ignored else []
    if cfg.warm_start.steps and cfg.sft.held_out and not cfg.sft.trajectories:
        warnings.append(
            f"warm_start.steps={cfg.warm_start.steps}: it trains on demonstrations that eval/loss may hold out; set it 0"
        )
    return warnings


DEFAULTS: Mapping[str, Any] = flat(RunConfig())


def with_epochs(cfg: RunConfig, size: int | None) -> RunConfig:
    """The configuration with the `steps` that sft.epochs comes to. size: examples of a pass, held-out ones apart. Raises
    ConfigError if the data has no end."""
    if size is None:
        raise ConfigError(f"sft.epochs={cfg.sft.epochs}: {cfg.data.task} has no end to count passes by; set steps instead")
    return dataclasses.replace(cfg, steps=max(1, math.ceil(size * cfg.sft.epochs / cfg.sft.batch_size)))


def train(cfg: RunConfig, source, run_dir: Path, resume_from: Path | None, warnings: list[str], examples=None) -> int:
    """Connect, build the driver, run it, leave a summary. examples: if they have been made already."""
    from rlpipe.data import report
    from rlpipe.monitor.console import Column
    from rlpipe.plan import roles
    from rlpipe.sft.driver import SftDriver
    from rlpipe.stage import Stage
    from rlpipe.warm_start import initial_model

    needed = [role for role in roles(cfg) if role.name == "learner"]
    columns = tuple(Column(*column) for column in CONSOLE if cfg.sft.objective == "certainty" or column[0] != "certainty")
    with Stage(cfg, run_dir, resume_from, warnings, columns=columns) as stage:
        monitor = stage.monitor
        with monitor.phase("initial weights", cfg.warm_start.steps) as phase:
            folder = initial_model(cfg, source, lambda done, total: phase.advance(1))
        with monitor.phase("looking at the examples"):
            examples = examples or _examples(cfg, source, folder)
        if report.write((*source.reports, *examples.reports), run_dir / report.NAME):
            monitor.note(f"records that were left out: {run_dir / report.NAME}")
        monitor.note(f"training on {examples.identity}{f'; {examples.size} a pass' if examples.size else ''}")
        stage.connect(needed)
        placement = stage.place(needed)
        stage.run(SftDriver(cfg, run_dir, monitor, examples, str(folder.resolve()), placement, resume_from))
    return 0


def _examples(cfg: RunConfig, source, folder: Path):
    from rlpipe.models.loading import load_tokenizer, recognise, settings_of
    from rlpipe.sft.examples import Demonstrations, Recordings
    from rlpipe.sft.recordings import read_recordings

    tokenizer = load_tokenizer(folder)
    size = recognise(folder, **settings_of(cfg.model)).spec.block_size
    if cfg.sft.trajectories:
        found = read_recordings(cfg.sft.trajectories, tokenizer, size)
        return Recordings(found, cfg.sft.trajectories, cfg.seed, block_size=size, hold_out=cfg.sft.held_out)
    return Demonstrations(
        source,
        tokenizer,
        max_tokens=cfg.rollout.decoder.max_tokens,
        block_size=size,
        hold_out=cfg.sft.held_out,
        skip_bad=cfg.data.bad_records == "skip",
    )
