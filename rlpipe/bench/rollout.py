"""`python -m rlpipe.bench rollout [key=value …]`: the engine against rollout as published, on the same weights and requests.

Tokens are valid ones (up to the first EOS and the request's limit), for everybody alike. With an exact cache, greedy and in
float32, all contestants give the same ones. In bfloat16 the result of a row depends a little on the shape of its batch; one
token that falls otherwise changes all that follow, so there `agreement` says little.
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

from rlpipe.bench import baselines, models
from rlpipe.bench.memory import PeakMemory
from rlpipe.bench.roofline import Roofline, roofline
from rlpipe.bench.settings import BASELINES, RolloutSettings, read
from rlpipe.bench.table import show_table
from rlpipe.errors import ConfigError
from rlpipe.models.policy import DiffusionLM
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.noise import sample_seed
from rlpipe.sampling.request import Request

ENGINE = "engine"


@dataclass(slots=True, kw_only=True)
class Result:
    """The best round of a contestant. responses: valid tokens of each request · work: counters by name · memory: peak bytes
    beyond what was held before, in a round of its own."""

    seconds: float
    responses: list[np.ndarray]
    work: dict[str, int]
    memory: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.responses))

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main(arguments: Sequence[str]) -> None:
    """Run, print the table, write `out`. Raises ConfigError or ModelError before anything runs."""
    settings = read(arguments)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no GPU here")
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    dtype = settings.dtype if settings.dtype != "auto" else ("float32" if settings.device == "cpu" else "bfloat16")
    model = models.build(settings.model, device=settings.device, dtype=dtype, seed=settings.seed)
    config = settings.decoder_config(model.spec.attention)
    decoder = Decoder.resolve(config, model.spec)
    if BASELINES[settings.baselines]:
        baselines.check_covered(decoder)
    requests = draw_requests(settings, model)
    results = compete(contestants(settings, model, decoder), requests, settings)
    floor = floor_of(results[ENGINE], requests, model, settings) if settings.device == "cuda" else None
    report = summary(results, decoder, floor) | {
        "settings": dataclasses.asdict(settings) | {"dtype": dtype, "threads": torch.get_num_threads()},
        "decoder": dataclasses.asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine_facts(),
        "versions": package_versions(),
    }
    show(results, report)
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")


def draw_requests(settings: RolloutSettings, model: DiffusionLM) -> list[Request]:
    """Random prompts of random length, each with a limit of its own."""
    rng, spec = np.random.default_rng(settings.seed), model.spec
    possible = np.setdiff1d(np.arange(model.lm.config.vocab_size), [*spec.forbidden_ids, *spec.eos_token_ids])

    def length(most: int) -> int:
        return int(rng.integers(max(1, most // 4), most, endpoint=True))

    return [
        Request(
            prompt_ids=rng.choice(possible, length(settings.prompt_len)).astype(np.int32),
            uid=f"bench/{index}",
            sample=0,
            seed=sample_seed(settings.seed, f"bench/{index}", 0),
            max_tokens=length(settings.max_tokens),
        )
        for index in range(settings.n)
    ]


Contestant = Callable[[list[Request]], tuple[list[np.ndarray], dict[str, int]]]


def contestants(settings: RolloutSettings, model: DiffusionLM, decoder: Decoder) -> dict[str, Contestant]:
    """The engine and the baselines asked for, by name: requests → (valid tokens of each, counters by name)."""

    sampler = Engine(model)  # one, as a rollout worker has

    def engine(requests):
        found, counters = sampler.sample(requests, decoder=decoder, version=0, slots=settings.slots)
        return [t.response_ids[: t.valid_len] for t in found], dataclasses.asdict(counters)

    def sequential(requests):
        some = requests[: settings.sequential_n or None]
        found, work = baselines.run(model, some, decoder, batch=1)
        return found, dataclasses.asdict(work)

    def lockstep(requests):
        found, work = baselines.run(model, requests, decoder, batch=len(requests))
        return found, dataclasses.asdict(work)

    known = {"sequential": sequential, "lockstep": lockstep}
    return {ENGINE: engine} | {name: known[name] for name in BASELINES[settings.baselines]}


def compete(runners: dict[str, Contestant], requests: list[Request], settings: RolloutSettings) -> dict[str, Result]:
    """`repeat` rounds in which everybody runs once, so that what else the machine does hits all; the best round of each.
    An untimed round before them measures memory, and nobody pays for what is loaded or tuned on first use."""
    best: dict[str, Result] = {}
    peak: dict[str, int] = {}
    synchronize = torch.cuda.synchronize if settings.device == "cuda" else (lambda: None)
    for name, runner in runners.items():
        memory = PeakMemory(settings.device)
        runner(requests if name != "sequential" else requests[:2])
        peak[name] = memory.stop()
    for _ in range(settings.repeat):
        for name, runner in runners.items():
            synchronize()
            start = time.perf_counter()
            responses, work = runner(requests)
            synchronize()
            seconds = time.perf_counter() - start
            result = Result(seconds=seconds, responses=responses, work=work, memory=peak[name])
            best[name] = min(best.get(name, result), result, key=lambda r: r.seconds)
    return best


def floor_of(result: Result, requests: list[Request], model: DiffusionLM, settings: RolloutSettings) -> Roofline:
    keys = float(np.mean([len(r.prompt_ids) + len(t) / 2 for r, t in zip(requests, result.responses, strict=True)]))
    return roofline(
        model,
        **{name: result.work[name] for name in ("forwards", "rows", "head_rows", "slot_steps")},
        keys=keys,
        tflops=settings.peak_tflops,
        tbs=settings.bandwidth_tbs,
    )


def agreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Share of valid tokens that are equal, of the requests both have served; a missing token is a wrong one."""
    pairs = list(zip(ours, theirs, strict=False))
    same = sum(int((a[: len(b)] == b[: len(a)]).sum()) for a, b in pairs)
    return same / sum(max(len(a), len(b)) for a, b in pairs)


def summary(results: dict[str, Result], decoder: Decoder, floor: Roofline | None) -> dict[str, Any]:
    """What `out` holds, without the circumstances. None: not measured."""
    ours = results[ENGINE]
    others = {name: result for name, result in results.items() if name != ENGINE}
    shares = {name: agreement(ours.responses, result.responses) for name, result in others.items()}
    rates = {name: results[name].rate if name in results else None for name in ("sequential", "lockstep")}
    report: dict[str, Any] = {"tokens_per_s": ours.rate}
    report |= {f"{name}_tokens_per_s": rate for name, rate in rates.items()}
    report |= {f"ratio_vs_{name}": ours.rate / rate if rate else None for name, rate in rates.items()}
    report |= {f"{name}_per_token": ours.work[name] / ours.tokens for name in ("forwards", "rows", "head_rows")}
    report |= {
        "host_syncs_per_step": ours.work["host_syncs"] / ours.work["forwards"],
        "peak_memory_bytes": ours.memory,
        "identical": all(share == 1.0 for share in shares.values()) if shares else None,
        "agreement": min(shares.values()) if shares else None,
        "exact": decoder.cache.exact,
        "tokens": ours.tokens,
        "seconds": ours.seconds,
        "contestants": {
            name: result.work | {"tokens": result.tokens, "seconds": result.seconds, "peak_memory_bytes": result.memory}
            for name, result in results.items()
        },
    }
    if floor is not None:
        report["roofline"] = dataclasses.asdict(floor) | {
            "tokens_per_s": ours.tokens / floor.seconds,
            "share": floor.seconds / ours.seconds,
        }
    return report


def show(results: dict[str, Result], report: dict[str, Any]) -> None:
    ours, settings = results[ENGINE], report["settings"]
    rows = []
    for name, r in results.items():
        per_token = [f"{r.work[key] / r.tokens:.3f}" for key in ("forwards", "rows", "head_rows")]
        faster = "" if name == ENGINE else f"{ours.rate / r.rate:.2f}x"
        syncs = f"{report['host_syncs_per_step']:.1f}" if name == ENGINE else ""
        rows.append((name, f"{r.rate:,.0f}", faster, *per_token, syncs, f"{r.seconds:.2f}", f"{r.memory / 1e6:,.0f}"))
    columns = ("", "tokens/s", "engine is", "forwards/token", "rows/token", "head rows/token", "syncs/step", "s", "peak MB")
    facts = (
        report["decoder"]["preset"],
        f"n {settings['n']}, prompts up to {settings['prompt_len']}, responses up to {settings['max_tokens']}",
        f"seed {settings['seed']}",
    )
    console = show_table(columns, rows, report, facts)
    if report["agreement"] is not None:
        cache = "exact" if report["exact"] else "approximate"
        console.print(f"tokens equal to the baselines': {report['agreement']:.1%} ({cache} cache, {settings['dtype']})")
    if "roofline" in report:
        floor = report["roofline"]
        console.print(f"roofline {floor['tokens_per_s']:,.0f} tokens/s for this work; reached {floor['share']:.1%} of it")
