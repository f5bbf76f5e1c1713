"""What a run will ask for and do, worked out before anything starts: roles, memory, the arithmetic of one step."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

from rlpipe.cluster import Role, ledger
from rlpipe.config import AlgoConfig, RunConfig
from rlpipe.contradictions import TINY_BLOCK_SIZE, block_size
from rlpipe.recipe import to_yaml
from rlpipe.verifiers.registry import BUILT_IN

PROCESS_GB = 0.5  # Python with torch and Ray, before any weights
VERIFIER_GB = 0.1
BYTES = {"float32": 4, "bfloat16": 2}


def parameter_count(cfg: RunConfig) -> int | None:
    """Parameters of the policy, from a tiny model's dimensions or a folder's config.json; None if unknown."""
    model = cfg.model
    if model.path.startswith("tiny:"):
        return _transformer(model.layers, model.width, model.mlp, model.width, model.width, 60, tied=False)
    path = Path(model.path) / "config.json"
    if not path.is_file():
        return None
    c = json.loads(path.read_text(encoding="utf8"))
    try:
        head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        queries = head * c["num_attention_heads"]
        keys = head * c.get("num_key_value_heads", c["num_attention_heads"])
        shape = (c["num_hidden_layers"], c["hidden_size"], c["intermediate_size"], queries, keys, c["vocab_size"])
    except KeyError:
        return None
    return _transformer(*shape, tied=c.get("tie_word_embeddings", False))


def _transformer(layers: int, width: int, mlp: int, queries: int, keys: int, vocabulary: int, tied: bool) -> int:
    attention = 2 * width * queries + 2 * width * keys
    return layers * (attention + 3 * width * mlp + 2 * width) + (1 if tied else 2) * vocabulary * width + width


def roles(cfg: RunConfig) -> list[Role]:
    """Workers by role, with an estimate of memory each; activations and caches come on top.

    N parameters of b bytes: a rollout worker holds N·b; a learner rank N·b of weights, N·b of gradients and 8 N of Adam
    moments (12 N with the float32 master of bfloat16), divided over ranks from ZeRO 3, 2 and 1 on.
    """
    count, ranks, stage = parameter_count(cfg), cfg.learner.workers, cfg.learner.zero_stage
    weight = BYTES[cfg.model.dtype]
    rollout_gb = learner_gb = 0.0
    if count is not None:
        master = 0 if weight == 4 else 4
        optimizer = (8 + master) / (ranks if stage >= 1 else 1)
        gradient = weight / (ranks if stage >= 2 else 1)
        held = weight / (ranks if stage >= 3 else 1)
        rollout_gb = PROCESS_GB + count * weight / 2**30
        learner_gb = PROCESS_GB + count * (held + gradient + optimizer) / 2**30
    found = [
        Role("rollout", cfg.rollout.workers, cfg.rollout.cpus, cfg.rollout.gpus, rollout_gb),
        Role("verifier", cfg.verifier.workers, cfg.verifier.cpus, 0.0, VERIFIER_GB),
        Role("learner", ranks, cfg.learner.cpus, cfg.learner.gpus, learner_gb),
    ]
    if cfg.value.enabled:
        found.append(Role("value", ranks, cfg.learner.cpus, cfg.learner.gpus, learner_gb))
    return found


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
    missing = []
    config = Path(cfg.model.path) / "config.json"
    if cfg.model.path not in TINY_BLOCK_SIZE and not config.is_file():
        missing.append(f"the model: no {config} (model.path)")
    elif cfg.model.path not in TINY_BLOCK_SIZE and "diffusion" not in json.loads(config.read_text(encoding="utf8")):
        missing.append(f"the model: {config} has no 'diffusion' entry that says how it denoises")
    for key, path in (("data.train", cfg.data.train), ("data.test", cfg.data.test)):
        if path and not Path(path).is_file():
            missing.append(f"the data: no file {path} ({key})")
    verifier = cfg.verifier.name
    if verifier and ":" not in verifier and verifier not in BUILT_IN:
        missing.append(f"the verifier: {verifier} is none of {', '.join(BUILT_IN)}; give FILE.py:FUNCTION (verifier.name)")
    packages = {
        "math_verify": cfg.verifier.name == "math",
        "reasoning_gym": cfg.data.task.startswith("reasoning_gym"),
        "wandb": cfg.monitor.wandb != "disabled",
        "peft": cfg.learner.lora_rank > 0,
        **dict.fromkeys(("torch", "transformers", "ray", "deepspeed"), True),
    }
    missing += [f"the package {name}" for name, wanted in packages.items() if wanted and not importlib.util.find_spec(name)]
    gpus = sum(role.workers * role.gpus for role in roles(cfg))
    if gpus > local_resources()["GPU"]:
        missing.append(f"{gpus:g} GPUs: this machine has {local_resources()['GPU']:g}; on a cluster they may be there")
    return missing


def local_resources() -> dict[str, float]:
    """What a local cluster on this machine would offer, in Ray's terms."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), "memory": float(memory)}


def describe(cfg: RunConfig, resources: dict[str, float] | None) -> str:
    """The text of `dry_run=true`. resources: of the cluster, None for this machine."""
    count = parameter_count(cfg)
    missing = needs(cfg)
    return "\n\n".join(
        [
            to_yaml(cfg).rstrip(),
            f"model: {f'{count / 1e6:.2f}M parameters' if count else 'size unknown until its config.json is there'}",
            "placement (memory per role without activations and caches)\n" + ledger(roles(cfg), resources or local_resources()),
            "one step\n" + step_arithmetic(cfg),
            "needed and not here:\n" + "\n".join(f"  - {item}" for item in missing) if missing else "everything needed is here",
        ]
    )
