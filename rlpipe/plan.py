"""What a run will ask for and do, worked out before anything starts: roles, memory, the arithmetic of one step."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlpipe.bundles import Machine, Role, bundles_of, ledger, seating
from rlpipe.config import AlgoConfig, RunConfig
from rlpipe.contradictions import CONVERT, TINY_BLOCK_SIZE, block_size
from rlpipe.data.description import describe_source, missing_data
from rlpipe.errors import ModelError
from rlpipe.model_shapes import PUBLISHED, Shape, block_of, declared, is_hub_id, local_folder, shape_of
from rlpipe.models.checkpoint_files import WeightFiles
from rlpipe.models.memory import GPUS_GB, ROOM, Part, adapter_parameters, learner_parts, rollout_parts, size, table
from rlpipe.recipe import to_yaml
from rlpipe.server_settings import wanted
from rlpipe.verifiers.registry import BUILT_IN

PROCESS_GB = 0.5  # Python with torch and Ray, before any weights
VERIFIER_GB = 0.1
BYTES = {"float32": 4, "bfloat16": 2}
SMOLLM2 = "smollm2"  # of a package, see `models.smollm2`
MACHINE_GPUS = 8  # of the machine that most clusters are made of
PROMPT_TOKENS = 512  # of a prompt, where no limit says
TINY_VOCABULARY = 60  # a character tokenizer has some tens of tokens


def shape(cfg: RunConfig) -> Shape | None:
    """Of the policy: a tiny model's dimensions, a config.json that is here, or what is known of a published model; None if
    nothing says it."""
    model = cfg.model
    if model.path in TINY_BLOCK_SIZE:
        heads = {"heads": model.heads, "kv_heads": model.heads, "head_dim": model.width // model.heads}
        return Shape(layers=model.layers, width=model.width, mlp=model.mlp, vocabulary=TINY_VOCABULARY, **heads)
    config = declared(model.path, model.revision)
    if config is not None:
        return shape_of(config)
    return PUBLISHED[model.path].shape if model.path in PUBLISHED else None


def parameter_count(cfg: RunConfig) -> int | None:
    """Parameters of the policy, from the headers of its weights or from its shape; None if unknown."""
    folder = local_folder(cfg.model.path, cfg.model.revision)
    if folder is not None:
        try:
            return WeightFiles(folder).parameters
        except ModelError:  # not all of them are here; `needs` says so
            pass
    known = shape(cfg)
    return None if known is None else known.parameters


def roles(cfg: RunConfig) -> list[Role]:
    """Workers by role, with an estimate of memory each; activations and caches come on top.

    A rollout worker holds the weights, a learner rank weights, gradients and optimizer: see `rlpipe.models.memory`. Servers are
    those that start with the run; what they need of the host is not known.
    """
    count, ranks = parameter_count(cfg), cfg.learner.workers
    rollout_gb = learner_gb = 0.0
    if count is not None:
        rollout_gb = PROCESS_GB + (0 if cfg.rollout.gpus else count * BYTES[cfg.model.dtype] / 2**30)
        parts = learner_parts(None, count, BYTES[cfg.model.dtype], **_learner_settings(cfg))
        learner_gb = PROCESS_GB + sum(part.nbytes for part in parts if part.on_host or not cfg.learner.gpus) / 2**30
    elastic = 0 < cfg.rollout.min_workers < cfg.rollout.workers
    found = [
        Role("rollout", cfg.rollout.workers, cfg.rollout.cpus, cfg.rollout.gpus, rollout_gb, cfg.rollout.min_workers),
        Role("verifier", cfg.verifier.workers, cfg.verifier.cpus, 0.0, VERIFIER_GB, int(elastic)),
        Role("learner", ranks, cfg.learner.cpus, cfg.learner.gpus, learner_gb),
    ]
    if cfg.value.enabled:
        found.append(Role("value", ranks, cfg.learner.cpus, cfg.learner.gpus, learner_gb))
    found += [Role(name, 1, server.cpus, server.gpus) for name, server in wanted(cfg).items()]
    return [dataclasses.replace(role, shared=role.name in cfg.cluster.colocate) for role in found]


def _learner_settings(cfg: RunConfig, trainable: int | None = None) -> dict[str, Any]:
    config = cfg.learner
    return {
        "ranks": config.workers, "stage": config.zero_stage, "offload": config.offload, "token_budget": config.token_budget,
        "checkpointing": config.activation_checkpointing, "trainable": trainable,
    }  # fmt: skip


def memory(cfg: RunConfig) -> str:
    """Of one worker of each role with caches and activations, the arithmetic, and the GPUs that have room for it."""
    count, known, width = parameter_count(cfg), shape(cfg), BYTES[cfg.model.dtype]
    if count is None:
        return "  unknown until the model's config.json is here"
    decoder, config = cfg.rollout.decoder, cfg.learner
    slots = cfg.rollout.slots or cfg.rollout.batch_size
    prompt = cfg.data.max_prompt_tokens or PROMPT_TOKENS
    rows = slots * (block_size(cfg) or decoder.block_size or decoder.max_tokens)
    rollout = rollout_parts(known, count, width, slots=slots, tokens=prompt + decoder.max_tokens, rows=rows)
    trainable = adapter_parameters(known, config.lora_rank, config.lora_targets) if known and config.lora_rank else None
    learner = learner_parts(known, count, width, **_learner_settings(cfg, trainable))
    lines = [*table("rollout", rollout).splitlines(), *table("learner", learner).splitlines()]
    if known is not None and not cfg.rollout.slots:
        lines.insert(0, _slots_line(rollout, slots))
    lines.insert(0, f"a prompt is taken to have {prompt} tokens" + ("" if cfg.data.max_prompt_tokens else " (assumed)"))
    if cfg.value.enabled:
        lines.append("value      as the learner, on GPUs of its own")
    return "\n".join(f"  {line}" for line in lines)


def _slots_line(parts: list[Part], slots: int) -> str:
    """How many of the slots each GPU has room for; the others follow as they finish."""
    each = sum(part.nbytes for part in parts if part.name != "weights") / slots
    weights = sum(part.nbytes for part in parts if part.name == "weights")
    room = {gb: min(slots, max(0, int((ROOM * gb * 1e9 - weights) // each))) for gb in GPUS_GB}
    return "rollout.slots=0: as many at once as fit: " + ", ".join(f"{number} on {gb} GB" for gb, number in room.items())


def step_arithmetic(cfg: RunConfig) -> str:
    """Prompts × samples → responses → tokens → rows → packed tokens → micro-batches → updates; upper bounds.

    A folder that does not say how it attends is counted as a block model of 4.
    """
    algo, decoder = cfg.algo, cfg.rollout.decoder
    responses = algo.prompts_per_step * algo.samples_per_prompt
    tokens = responses * decoder.max_tokens
    known = block_size(cfg)
    grid = 4 if known is None else known
    steps = math.ceil((grid or decoder.max_tokens) / decoder.tokens_per_step)
    rows = rows_per_response(algo, steps)
    sequence, sequences = (decoder.max_tokens * (1 + rows), 1) if grid else (decoder.max_tokens, rows)
    packed = sequence * sequences
    per_update = responses // algo.updates_per_step
    together = max(1, cfg.learner.token_budget // sequence)
    micro = math.ceil(per_update * sequences / together / cfg.learner.workers)
    kind = (f"block {grid}" if grid else "whole canvas") + (" (assumed)" if known is None else "")
    return "\n".join(
        [
            f"{algo.prompts_per_step} prompts × {algo.samples_per_prompt} samples = {responses} responses",
            f"  × at most {decoder.max_tokens} tokens = {tokens} tokens, in units of {cfg.rollout.batch_size} "
            f"responses over {cfg.rollout.workers} rollout workers",
            f"  {kind}, {decoder.tokens_per_step} token(s) a step, shrink {algo.shrink}: at most {rows} row(s) a "
            f"response = {responses * rows} rows",
            f"  packed: at most {packed} tokens a response besides the prompt = {responses * packed} tokens",
            f"  {algo.updates_per_step} update(s) × {algo.epochs} epoch(s), {per_update} responses each, about {micro} "
            f"micro-batch(es) of {cfg.learner.token_budget} tokens on each of {cfg.learner.workers} rank(s)",
        ]
    )


def rows_per_response(algo: AlgoConfig, steps: int) -> int:
    """At most, for a rollout of so many denoising steps (block models: of each block)."""
    draws = algo.options.get("draws", 2 if algo.preset in ("espo", "spg") else 1)
    fixed = {"random_mask": draws, "diffu_grpo": 1, "wd1": 1, "coupled_grpo": 3, "spg": draws, "espo": 2 * draws}
    if algo.preset in fixed:
        return fixed[algo.preset]
    limit = {"mdpo": algo.options.get("steps", 8), "d2_stepmerge": algo.options.get("count", 16)}
    limit["agrpo"] = algo.options.get("count", 24)
    return min(limit.get(algo.preset, steps), math.ceil(steps / algo.shrink))


def needs(cfg: RunConfig) -> list[str]:
    """What is missing on this machine for a real run, a line each."""
    missing = [*_missing_models(cfg), *missing_data(cfg.data)]
    verifiers = [name for name in (cfg.verifier.name, *cfg.verifier.parts) if name not in ("", "task")]
    for verifier in verifiers:
        if ":" not in verifier and verifier not in BUILT_IN:
            missing.append(f"the verifier: {verifier} is none of {', '.join(BUILT_IN)}; give FILE.py:FUNCTION")
    packages = {
        "math_verify": "math" in verifiers,
        "reasoning_gym": cfg.data.task.startswith("reasoning_gym"),
        "wandb": cfg.monitor.wandb != "disabled",
        "peft": cfg.learner.lora_rank > 0,
        "gguf": cfg.model.path == f"{CONVERT}{SMOLLM2}",
        "vllm": bool(wanted(cfg)) and not os.environ.get("RLPIPE_VLLM_PYTHON"),
        **dict.fromkeys(("torch", "transformers", "ray", "deepspeed"), True),
    }
    missing += [f"the package {name}" for name, asked in packages.items() if asked and not importlib.util.find_spec(name)]
    gpus = sum(bundle.gpus for bundle in bundles_of(roles(cfg)))
    if gpus > local_resources()["GPU"]:
        missing.append(f"{gpus:g} GPUs: this machine has {local_resources()['GPU']:g}; on a cluster they may be there")
    return missing


def _missing_models(cfg: RunConfig) -> list[str]:
    """What of the models is not here or cannot work, without loading anything heavy."""
    path, missing = cfg.model.path, []
    if path.startswith(CONVERT):
        source = path.removeprefix(CONVERT)
        missing += [] if source == SMOLLM2 else _absent("the model to convert", "model.path", source, "")
    elif path not in TINY_BLOCK_SIZE:
        missing += _missing_model("the model", "model.path", path, cfg.model.revision, cfg.model.family)
    if cfg.value.enabled and cfg.value.path:
        missing += _missing_model("the value model", "value.path", cfg.value.path, "", cfg.model.family)
    return missing


def _missing_model(what: str, key: str, path: str, revision: str, family: str) -> list[str]:
    folder = local_folder(path, revision)
    if folder is None:
        return _absent(what, key, path, revision)
    missing = []
    if block_of(declared(path, revision)) is None and not family and path not in PUBLISHED:
        missing.append(
            f"{what}: {folder / 'config.json'} has no 'diffusion' entry that says how it denoises, and by itself shows no "
            f"family that needs none; `python -m rlpipe.models inspect {path}` says more"
        )
    try:
        WeightFiles(folder)
    except ModelError as error:
        missing.append(f"{what}: {error}")
    return missing


def _absent(what: str, key: str, path: str, revision: str) -> list[str]:
    if local_folder(path, revision) is not None:
        return []
    if not is_hub_id(path):
        return [f"{what}: no {Path(path) / 'config.json'} ({key})"]
    known = PUBLISHED.get(path)
    size_of = f"of about {size(2 * known.shape.parameters)} in bfloat16" if known else "of unknown size"
    command = f"hf download {path}{f' --revision {revision}' if revision else ''}"
    return [f"{what}: {path} ({size_of}) is not in the local cache; fetched at the start, or with {command}"]


def local_resources() -> dict[str, float]:
    """What a local cluster on this machine would offer, in Ray's terms."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), "memory": float(memory)}


def seats(cfg: RunConfig, machines: Sequence[Machine]) -> str:
    """Who sits on which GPU; on machines of eight if the workers do not fit on these."""
    bundles = bundles_of(roles(cfg))
    if not any(bundle.gpus for bundle in bundles):
        return "  no GPUs are asked for"
    lines = seating(bundles, machines)
    if lines:
        return "\n".join(f"  {line}" for line in lines)
    usual = {"CPU": math.inf, "GPU": float(MACHINE_GPUS)}
    lines = seating(bundles, [usual] * len(bundles))
    where = f"  not on these machines; on machines of {MACHINE_GPUS} GPUs:"
    return "\n".join([where, *(f"  {line}" for line in lines)]) if lines else "  a worker asks for more GPUs than that"


def describe(cfg: RunConfig, resources: dict[str, float] | None, machines: Sequence[Machine] = ()) -> str:
    """The text of `dry_run=true`. resources: of the cluster, None for this machine; machines: one by one, if they are known."""
    count = parameter_count(cfg)
    missing = needs(cfg)
    return "\n\n".join(
        [
            to_yaml(cfg).rstrip(),
            f"model: {f'{count / 1e6:.2f}M parameters' if count else 'size unknown until its config.json is there'}",
            describe_source(cfg),
            "placement (host memory per role, without activations and caches; of the GPUs see below)\n"
            + ledger(roles(cfg), resources or local_resources()),
            "who sits where\n" + seats(cfg, machines or [resources or local_resources()]),
            "memory of one worker, estimated\n" + memory(cfg),
            "one step\n" + step_arithmetic(cfg),
            "needed and not here:\n" + "\n".join(f"  - {item}" for item in missing) if missing else "everything needed is here",
        ]
    )
