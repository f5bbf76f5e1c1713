"""`python -m rlpipe.bench learner [key=value …]`: the packed learner against a learner as published, on the same trajectories.

One optimizer update's gradient, old log-probabilities included as each side gets them. Packed: from the update's own forward
pass, since the update opens its step. Published (TraceRL's block code, arXiv 2509.06949): by a pass of their own over every
row; rows go one at a time as [prompt | clean response | noisy response] under a dense mask, with logits of the whole vocabulary
at every position.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlpipe.bench import models
from rlpipe.bench.experience import draw_step
from rlpipe.bench.memory import PeakMemory
from rlpipe.bench.settings import LearnerSettings, read
from rlpipe.bench.table import show_table
from rlpipe.errors import ConfigError
from rlpipe.learner.batches import Batches
from rlpipe.learner.micro_batches import Sizes, plan_micro_batches
from rlpipe.learner.samples import Sample
from rlpipe.models.attention import DensePlan
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.visibility import Tags, visibility
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.objectives.entries import Entries
from rlpipe.objectives.objective import Objective

PACKED, PUBLISHED = "packed", "published"


@dataclass(slots=True, kw_only=True)
class Result:
    """The best round of a contestant. tokens: through the backbone with gradient · scoring_tokens: without · head_rows: of the
    LM head with gradient · gradient: of all parameters, flat."""

    seconds: float
    loss: float
    tokens: int
    scoring_tokens: int
    head_rows: int
    scored: int
    gradient: torch.Tensor
    memory: int


def main(arguments: Sequence[str]) -> None:
    """Run, print the table, write `out`. Raises ConfigError or ModelError before anything runs."""
    settings = read(arguments, LearnerSettings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no GPU here")
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    dtype = settings.dtype if settings.dtype != "auto" else ("float32" if settings.device == "cpu" else "bfloat16")
    model = models.build(settings.model, device=settings.device, dtype=dtype, seed=settings.seed)
    if not model.spec.block_size:
        raise ConfigError(f"model={settings.model}: this bench is about block models; full attention has nothing to share")
    if (settings.prompt_len + settings.response_len) % model.spec.block_size:
        raise ConfigError(f"prompt_len + response_len must be a multiple of the block size {model.spec.block_size}")
    if settings.checkpointing:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    plan, objective = draw_step(settings, model)
    runners = {PACKED: lambda: packed(model, plan.samples, objective, settings.token_budget)}
    if settings.baselines == PUBLISHED:
        runners[PUBLISHED] = lambda: published(model, plan.samples, objective)
    results = compete(runners, model, settings)
    report = summary(results, unit_cost(model, settings), model, settings) | {
        "settings": dataclasses.asdict(settings) | {"dtype": dtype, "threads": torch.get_num_threads()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine_facts(),
        "versions": package_versions(),
    }
    show(results, report)
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")


def packed(model: DiffusionLM, samples: Sequence[Sample], objective: Objective, budget: int) -> dict[str, Any]:
    """The learner's own way, without DeepSpeed: the same micro-batches, packs and loss."""
    work = {"loss": 0.0, "tokens": 0, "scoring_tokens": 0, "head_rows": 0, "scored": 0}
    batches = Batches(samples, model.spec, model.device)
    for batch in plan_micro_batches(Sizes.of(samples), range(len(samples)), budget, 1)[0]:
        held = batches.packed(batch)
        inputs = (held.input_ids, held.position_ids, held.plan(), held.index, held.targets)
        logp, entropy = model(*inputs, entropy="value")
        order = held.slot.argsort()
        terms = objective.loss(logp[order], logp[order].detach(), batches.entries(batch), entropy=entropy[order])
        terms.loss.backward()
        work["loss"] += float(terms.loss.detach())
        work["tokens"] += held.input_ids.numel()
        work["head_rows"] += len(held.index)
        work["scored"] += len(held.index)
    return work


def published(model: DiffusionLM, samples: Sequence[Sample], objective: Objective) -> dict[str, Any]:
    work = {"loss": 0.0, "tokens": 0, "scoring_tokens": 0, "head_rows": 0, "scored": 0}
    for sample in samples:
        start = 0
        for row in range(len(sample.scored)):
            inputs = _extended(sample, row, model)
            end = start + int(sample.scored[row].sum())
            with torch.no_grad():
                old = _row_logp(model, sample, row, *inputs)
            logp = _row_logp(model, sample, row, *inputs)
            terms = objective.loss(logp, old, _entries(sample, slice(start, end), model.device))
            terms.loss.backward()
            work["loss"] += float(terms.loss.detach())
            work["tokens"] += inputs[0].numel()
            work["scoring_tokens"] += inputs[0].numel()
            work["head_rows"] += inputs[0].numel()
            work["scored"] += end - start
            start = end
    return work


def _extended(sample: Sample, row: int, model: DiffusionLM):
    """(input_ids, position_ids [1, P + 2 L], dense plan) of one row with a clean copy of its own."""
    prompt, response = len(sample.prompt_ids), len(sample.response_ids)
    noisy = np.where(sample.masked[row], model.spec.mask_token_id, sample.response_ids)
    ids = np.concatenate([sample.prompt_ids, sample.response_ids, noisy]).astype(np.int64)
    position = np.concatenate([np.arange(prompt + response), prompt + np.arange(response)])
    block = torch.from_numpy(position // sample.block_size)
    copy = torch.zeros_like(block)
    copy[prompt + response :] = 1 + block[prompt + response :]
    zeros = torch.zeros_like(block)
    mask = visibility(Tags(zeros, zeros, block, copy))[None]
    device = model.device
    return torch.from_numpy(ids)[None].to(device), torch.from_numpy(position)[None].to(device), DensePlan(mask.to(device))


def _row_logp(model: DiffusionLM, sample: Sample, row: int, ids, position, plan) -> torch.Tensor:
    logp = torch.log_softmax(model.logits(model.hidden(ids, position, plan)[0]), -1)
    where = np.flatnonzero(sample.scored[row])
    index = torch.from_numpy(len(sample.prompt_ids) + len(sample.response_ids) + where).to(logp.device)
    targets = torch.from_numpy(sample.response_ids[where].astype(np.int64)).to(logp.device)
    return logp[index, targets]


def _entries(sample: Sample, part: slice, device) -> Entries:
    names = ("advantage", "policy_weight", "kl_weight")
    column = {name: torch.from_numpy(getattr(sample, name)[part]).to(device) for name in names}
    return Entries(unit=None, coefficient=None, **column)


def compete(runners: dict[str, Callable], model: DiffusionLM, settings: LearnerSettings) -> dict[str, Result]:
    """`repeat` rounds in which everybody runs once, so that what else the machine does hits all; the best round of each. An
    untimed round before them measures memory, and nobody pays for what is loaded or compiled on first use."""
    best: dict[str, Result] = {}
    peak: dict[str, int] = {}
    for name, runner in runners.items():
        model.zero_grad(set_to_none=True)
        memory = PeakMemory(settings.device)
        runner()
        peak[name] = memory.stop()
    for _ in range(settings.repeat):
        for name, runner in runners.items():
            model.zero_grad(set_to_none=True)
            seconds, work = _timed(runner, settings.device)
            gradient = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
            result = Result(seconds=seconds, gradient=gradient, memory=peak[name], **work)
            best[name] = min(best.get(name, result), result, key=lambda r: r.seconds)
    return best


def _timed(work: Callable, device: str) -> tuple[float, Any]:
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    synchronize()
    start = time.perf_counter()
    found = work()
    synchronize()
    return time.perf_counter() - start, found


def unit_cost(model: DiffusionLM, settings: LearnerSettings) -> tuple[float, float]:
    """Seconds of a forward and backward pass per backbone token and per row of the LM head, in a plain batch of whole sequences
    where every token sees every other: what the packed tokens would cost if packing itself cost nothing."""
    length = settings.prompt_len + settings.response_len
    ids = torch.zeros(settings.samples, length, dtype=torch.long, device=model.device)
    position = torch.arange(length, device=model.device).expand_as(ids)
    plan = DensePlan(None)

    def body():
        hidden = model.hidden(ids, position, plan)
        hidden.sum().backward()
        return hidden.detach()

    rows = settings.samples * settings.response_len
    index = torch.arange(rows, device=model.device)

    def head(hidden):
        leaf = hidden.flatten(0, 1)[:rows].requires_grad_()
        torch.log_softmax(model.logits(leaf), -1)[index, 0].sum().backward()

    hidden = body()
    head(hidden)
    per_token = min(_timed(body, settings.device)[0] for _ in range(3)) / ids.numel()
    per_row = min(_timed(lambda: head(hidden), settings.device)[0] for _ in range(3)) / rows
    model.zero_grad(set_to_none=True)
    return per_token, per_row


def summary(results: dict[str, Result], cost: tuple[float, float], model: DiffusionLM, settings: LearnerSettings) -> dict:
    """What `out` holds, without the circumstances. None: not measured."""
    ours, theirs = results[PACKED], results.get(PUBLISHED)
    floor = ours.tokens * cost[0] + ours.scored * cost[1]
    report: dict[str, Any] = {
        "tokens_per_s": ours.tokens / ours.seconds,
        "scored_tokens_per_s": ours.scored / ours.seconds,
        "seconds": ours.seconds,
        "floor_seconds": floor,
        "floor_ratio": ours.seconds / floor,
        "head_rows_per_scored_token": ours.head_rows / ours.scored,
        "peak_memory_bytes": ours.memory,
        "contestants": {
            name: {f.name: getattr(r, f.name) for f in dataclasses.fields(r) if f.name != "gradient"}
            for name, r in results.items()
        },
    }
    if settings.device == "cuda":
        config = model.lm.config
        body = sum(p.numel() for layer in model.lm.model.layers for p in layer.parameters())
        flop = 6 * (body * ours.tokens + config.hidden_size * config.vocab_size * ours.head_rows)
        report["flop_share"] = flop / ours.seconds / (settings.peak_tflops * 1e12)
    for name in ("tokens_ratio", "time_ratio", "head_rows_ratio", "memory_ratio", "max_grad_diff", "loss_diff"):
        report[name] = None
    if theirs is not None:
        report |= {
            "tokens_ratio": theirs.tokens / ours.tokens,
            "time_ratio": theirs.seconds / ours.seconds,
            "head_rows_ratio": theirs.head_rows / ours.head_rows,
            "memory_ratio": theirs.memory / max(ours.memory, 1),
            "max_grad_diff": float((ours.gradient - theirs.gradient).abs().max() / theirs.gradient.abs().max()),
            "loss_diff": abs(ours.loss - theirs.loss),
        }
    return report


def show(results: dict[str, Result], report: dict[str, Any]) -> None:
    ours, settings = results[PACKED], report["settings"]
    rows = []
    for name, r in results.items():
        ratios = ("", "") if name == PACKED else (f"{r.seconds / ours.seconds:.2f}x", f"{r.tokens / ours.tokens:.2f}x")
        counts = (f"{r.scoring_tokens:,}", f"{r.head_rows:,}", f"{r.scored:,}", f"{r.memory / 1e6:,.0f}")
        rows.append((name, f"{r.seconds:.2f}", ratios[0], f"{r.tokens:,}", ratios[1], *counts))
    columns = ("", "s", "packed is", "tokens", "fewer", "old log-prob tokens", "head rows", "scored", "peak MB")
    facts = (
        f"{settings['groups']} groups of {settings['samples']}, prompt {settings['prompt_len']}, "
        f"response {settings['response_len']}, {settings['tokens_per_step']} token(s) a step, shrink {settings['shrink']}",
    )
    console = show_table(columns, rows, report, facts)
    console.print(
        f"packed: {report['tokens_per_s']:,.0f} backbone tokens/s, {report['floor_ratio']:.2f} times the floor of "
        f"{report['floor_seconds']:.2f} s (its tokens in a plain batch)"
    )
    if report["max_grad_diff"] is not None:
        console.print(
            f"largest difference of gradients: {report['max_grad_diff']:.1e} of the largest gradient; of losses: "
            f"{report['loss_diff']:.1e}"
        )
    if "flop_share" in report:
        console.print(f"{report['flop_share']:.1%} of {settings['peak_tflops']:g} TFLOP/s, attention not counted")
