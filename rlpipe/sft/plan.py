"""What a supervised run will ask for and do, worked out before anything starts."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from rlpipe.cluster import ledger
from rlpipe.config import RunConfig
from rlpipe.contradictions import CONVERT
from rlpipe.data.description import describe_source
from rlpipe.plan import local_resources, needs, roles
from rlpipe.recipe import to_yaml
from rlpipe.sft.driver import learner_config


def describe(cfg: RunConfig) -> str:
    """The text of `dry_run=true`: the configuration, the data, what is placed where, what a step is, what is missing."""
    source = cfg.model.path.removeprefix(CONVERT)
    known = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, path=source)) if Path(source).is_dir() else cfg
    learner = [role for role in roles(known) if role.name == "learner"]
    numbers = learner_config(cfg).algo.options
    what = f"recorded trajectories of {cfg.sft.trajectories}" if cfg.sft.trajectories else f"demonstrations of {cfg.data.task}"
    step = (
        f"{cfg.sft.batch_size} {what}, at most {cfg.rollout.decoder.max_tokens} response tokens each\n"
        f"  objective {cfg.sft.objective}, {', '.join(f'{k}={v}' for k, v in numbers.items()) or 'its own numbers'}\n"
        f"  packed to {cfg.learner.token_budget} tokens a micro-batch on {cfg.learner.workers} rank(s)"
    )
    missing = _missing(cfg, source)
    parts = [
        to_yaml(cfg).rstrip(),
        describe_source(known),
        "placement (memory without activations)\n" + ledger(learner, local_resources()),
        f"one step\n{step}",
        "needed and not here:\n" + "\n".join(f"  - {item}" for item in missing) if missing else "everything needed is here",
    ]
    return "\n\n".join(parts)


def _missing(cfg: RunConfig, source: str) -> list[str]:
    """A line for each thing that is not on this machine."""
    missing = needs(dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, gpus=0.0)))
    if cfg.model.path == f"{CONVERT}smollm2":
        if importlib.util.find_spec("gguf") is None:
            missing.append("the package gguf, which reads SmolLM2's file (extra smollm2)")
    elif cfg.model.path.startswith(CONVERT) and not Path(source).is_dir():
        missing.append(f"the model: {source}, which is to be converted, is no folder here; a hub id is fetched at the start")
    if cfg.sft.trajectories and not Path(cfg.sft.trajectories).exists():
        missing.append(f"the data: no {cfg.sft.trajectories} (sft.trajectories)")
    return missing
