"""The typed schema of an evaluation, what a finished run gives to it, and what it must not say."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlpipe import checkpoint, recipe, schema
from rlpipe.config import ClusterConfig, DataConfig, ModelConfig, RolloutConfig, RunConfig, ServerConfig, VerifierConfig
from rlpipe.contradictions import CONVERT, check_settings
from rlpipe.errors import ConfigError
from rlpipe.evaluation.samples import SEED
from rlpipe.monitor.latest import NAME as LATEST
from rlpipe.monitor.latest import latest_run
from rlpipe.server_settings import check_servers

SHORT = {  # names for what is said most often
    "task": "data.task",
    "test": "data.test",
    "template": "data.template",
    "max_tokens": "rollout.decoder.max_tokens",
    "temperature": "rollout.decoder.temperature",
    "verifier": "verifier.name",
    "workers": "rollout.workers",
}
SHARED = ("model", "data", "rollout", "verifier", "cluster", "judge", "guide")  # sections that a run has too
RESUME = ("never", "auto")
MADE = ("tiny:", CONVERT)  # models that a run makes before it starts


@dataclass
class EvaluationConfig:
    """One evaluation. `python -m rlpipe.eval model.path=FOLDER task=NAME decoders=[…] key=value …`."""

    decoders: list[Any] = field(default_factory=list)  # named decoders, or mappings of rollout.decoder's keys, beside them
    # `label` and `hex` (block lengths to vote over); `rollout` is rollout.decoder itself, and so is an empty list
    samples: int = 1  # responses to each prompt
    k: list[int] = field(default_factory=lambda: [1])  # pass@k is reported for each
    hex: list[int] = field(default_factory=list)  # block lengths: adds to every decoder the vote over them (full attention)
    prompts: int = 0  # held-out prompts; 0: all that the task has, of an endless one 256
    seed: int = SEED  # of the noise; the default is what runs evaluate themselves with
    confidence: float = 0.95  # of all intervals
    right: str = ""  # part of the verdict that says whether a response is right; empty: `correct`, or else the reward …
    right_at: float = 1.0  # … if it is at least this
    out: str = ""  # folder of the results; empty: outputs/eval/TASK/TIME
    resume: str = "never"  # never | auto: goes on in `out`, or where the task's latest evaluation stopped
    dry_run: bool = False  # says what would be done
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path=""))
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    judge: ServerConfig = field(default_factory=ServerConfig)  # for the verifiers llm_judge and reward_model
    guide: ServerConfig = field(default_factory=ServerConfig)  # for decoders with select: guided


def load(arguments: Sequence[str]) -> EvaluationConfig:
    """`key=value …` → EvaluationConfig. `run=FOLDER` takes model (its newest checkpoint), task, template, verifier, decoder
    and the servers that they ask from a run; `recipe=NAME|path.yaml` from a recipe, which may be a run's config.yaml. Raises
    ConfigError."""
    said = dict(recipe.split(argument) for argument in arguments)
    if "run" in said and "recipe" in said:
        raise ConfigError("run= and recipe= both say where the settings come from; give one of them")
    start, run = EvaluationConfig(), said.pop("run", "")
    if run:
        start = _from_recipe(_run_folder(run) / "config.yaml", trained=True)
    elif "recipe" in said:
        start = _from_recipe(said.pop("recipe"))
    cfg = recipe.load([f"{SHORT.get(key, key)}={value}" for key, value in said.items()], start, EvaluationConfig)
    if run and not cfg.model.path:
        raise ConfigError(
            f"run={run} has no complete checkpoint yet, so there is nothing of it to evaluate; wait for the first "
            "(checkpoint.every), or give model.path= to put another model to its task"
        )
    return cfg


def _run_folder(name: str) -> Path:
    folder = Path(name)
    if folder.name == LATEST:
        folder = latest_run(folder.parent) or folder
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"run={name}: there is no config.yaml, so it is no run's folder; give outputs/RECIPE/RUN, or …/latest"
        )
    return folder


def _from_recipe(name: str | Path, trained: bool = False) -> EvaluationConfig:
    """What a recipe says of the sections that an evaluation shares; a run's own recipe also says where its weights are.
    model.path is empty where no model is there to read: one that runs make themselves, or, with `trained`, that the run has not
    saved yet: the model that it started from would pass for its result."""
    cfg: RunConfig = recipe.load([f"recipe={name}"])
    saved = checkpoint.complete(Path(name).parent) if Path(name).is_file() else []
    if saved:
        cfg.model.path = str(saved[-1] / "model")
    elif trained or cfg.model.path.startswith(MADE):
        cfg.model.path = ""
    return EvaluationConfig(**{section: getattr(cfg, section) for section in SHARED})


def check(cfg: EvaluationConfig) -> None:
    """ConfigError for the first contradiction; those that need the model or the task come when these are read."""
    run_keys = schema.keys()
    check_settings({key: value for key, value in schema.flat(cfg).items() if key in run_keys})
    check_servers(cfg)
    if not cfg.model.path or cfg.model.path.startswith(MADE):
        raise ConfigError(
            f"model.path={cfg.model.path}: give the model to evaluate: run=outputs/RECIPE/latest for the newest checkpoint of "
            "a run, or model.path=FOLDER"
        )
    if cfg.samples < 1:
        raise ConfigError(f"samples={cfg.samples}: every prompt needs at least one response")
    if cfg.prompts < 0:
        raise ConfigError(f"prompts={cfg.prompts}: a number of held-out prompts, or 0 for all")
    if not cfg.k or min(cfg.k) < 1:
        raise ConfigError(f"k={cfg.k}: whole numbers of at least 1, for example k=[1,{cfg.samples}]")
    if max(cfg.k) > cfg.samples:
        raise ConfigError(
            f"k={cfg.k}: pass@{max(cfg.k)} takes at least {max(cfg.k)} responses to a prompt, and samples={cfg.samples}; set "
            f"samples={max(cfg.k)}"
        )
    if not 0 < cfg.confidence < 1:
        raise ConfigError(f"confidence={cfg.confidence}: a probability between 0 and 1, for example 0.95")
    if cfg.resume not in RESUME:
        near = difflib.get_close_matches(cfg.resume, RESUME, n=1, cutoff=0.0)[0]
        raise ConfigError(f"resume={cfg.resume} is not one of {', '.join(RESUME)}; did you mean {near}? The folder is out=")
