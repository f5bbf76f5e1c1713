"""`python -m rlpipe.bench guided [key=value …]`: guided decoding with a perfect, a useless and a random guide against the plain
decoder, in one process, on the same weights and requests.

Every guide costs a forward of the model itself: under full attention over whole sequences, as the model has it; for a block
model over the rows of the window, as a guide has it that keeps what it has read (a server with a prefix cache). The perfect
guide knows the plain decoder's greedy text, so it agrees with every draft's first token. Random weights say nothing about how
many drafts of a trained model are right; the bound on the useless guides holds for any.
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
from rlpipe.bench.settings import read
from rlpipe.bench.table import show_table
from rlpipe.config import DecoderConfig
from rlpipe.decoder_presets import decoder_config
from rlpipe.errors import ConfigError
from rlpipe.models.attention import DensePlan
from rlpipe.models.policy import DiffusionLM
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.sampling.decoder import Decoder, without_guide
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.noise import sample_seed
from rlpipe.sampling.request import Request

PLAIN = "plain"


@dataclass
class GuidedSettings:
    model: str = "3m:full"  # as of the rollout bench
    n: int = 4  # requests
    prompt_len: int = 48  # of the longest prompt; they are drawn from half of it upwards
    max_tokens: int = 48  # of every response; EOS ends none, so that all commit as many tokens
    base: str = "static"  # the plain selector
    tokens_per_step: int = 1  # of it
    patience: int = 4
    slots: int = 0  # of the engine; 0: one a request
    repeat: int = 2  # rounds; everybody runs once a round, and the best round counts
    threads: int = 0  # of torch; 0: all cores
    seed: int = 0  # of weights, prompts and guides
    out: str = ""  # a JSON file for the results

    def config(self, **options: Any) -> DecoderConfig:
        """The guided decoder, greedy."""
        own = {"base": self.base, "patience": self.patience} | options
        sizes = {"max_tokens": self.max_tokens, "tokens_per_step": self.tokens_per_step}
        return decoder_config("freecache_guided", temperature=0.0, stop="length", options=own, **sizes)


class CostlyGuide:
    """`answer(tokens) → ids` after a forward of the model. seconds: spent here."""

    def __init__(self, model: DiffusionLM, answer: Callable[[Sequence[int]], np.ndarray]):
        self.model, self.answer, self.seconds = model, answer, 0.0

    @torch.inference_mode()
    def greedy_next(self, tokens: Sequence[Sequence[int]], *, timeout_s: float) -> list[np.ndarray]:
        start = time.perf_counter()
        size = self.model.spec.block_size
        rows = [row[-size:] for row in tokens]  # of size 0 all
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64, device=self.model.device)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.as_tensor(row)
        where = torch.arange(longest, device=ids.device).expand_as(ids)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=ids.device).tril().expand(len(rows), -1, -1)
        hidden = self.model.hidden(ids, where, DensePlan(causal))
        self.model.logits(hidden.flatten(0, 1)).argmax(-1).cpu()
        found = [self.answer(row) for row in tokens]
        self.seconds += time.perf_counter() - start
        return found


def main(arguments: Sequence[str]) -> None:
    """Run, print the table, write `out`. Raises ConfigError or ModelError before anything runs."""
    settings = read(arguments, GuidedSettings)
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    model = models.build(settings.model, device="cpu", dtype="float32", seed=settings.seed)
    requests = draw_requests(settings, model)
    results = compete(settings, model, requests)
    report = {
        "settings": dataclasses.asdict(settings) | {"dtype": "float32", "device": "cpu", "threads": torch.get_num_threads()},
        "results": results,
        "parameters": sum(p.numel() for p in model.parameters()),
        "machine": machine_facts(),
        "versions": package_versions(),
    }
    show(report)
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")


def draw_requests(settings: GuidedSettings, model: DiffusionLM) -> list[Request]:
    """Random prompts of random length; their first tokens differ."""
    rng, spec = np.random.default_rng(settings.seed), model.spec
    possible = np.setdiff1d(np.arange(model.lm.config.vocab_size), [*spec.forbidden_ids, *spec.eos_token_ids])
    if settings.n > len(possible):
        raise ConfigError(f"n={settings.n}: at most {len(possible)} prompts can begin with different tokens; use fewer")
    first = rng.choice(possible, settings.n, replace=False)
    least = max(1, settings.prompt_len // 2)
    lengths = rng.integers(least, settings.prompt_len, settings.n, endpoint=True)
    return [
        Request(
            prompt_ids=np.array([start, *rng.choice(possible, length - 1)], np.int32),
            uid=f"bench/{index}",
            sample=0,
            seed=sample_seed(settings.seed, f"bench/{index}", 0),
        )
        for index, (start, length) in enumerate(zip(first, lengths, strict=True))
    ]


def compete(settings: GuidedSettings, model: DiffusionLM, requests: list[Request]) -> dict[str, dict[str, Any]]:
    """By contestant: forwards, guide_calls, guide_tokens, tokens (committed), seconds and guide_seconds of the best round,
    and same_text: its responses are the plain decoder's."""
    guided = Decoder.resolve(settings.config(), model.spec)
    corrected = Decoder.resolve(settings.config(correct=True, patience=4 * settings.patience), model.spec)
    plain = Decoder.resolve(without_guide(settings.config()), model.spec)
    texts, _ = Engine(model).sample(requests, decoder=plain, version=0, slots=settings.slots)
    known = {int(t.prompt_ids[0]): np.concatenate([t.prompt_ids, t.response_ids, [0]]) for t in texts}
    rng = np.random.default_rng(settings.seed)
    answers = {
        "perfect": lambda row: known[int(row[0])][1 : len(row) + 1],
        "useless": lambda row: np.full(len(row), model.spec.mask_token_id),
        "random": lambda row: rng.integers(0, model.lm.config.vocab_size, len(row)),
    }
    runners = {PLAIN: (plain, None)} | {name: (guided, CostlyGuide(model, answer)) for name, answer in answers.items()}
    runners |= {f"{name}, correct": (corrected, CostlyGuide(model, answers[name])) for name in ("perfect", "random")}
    best: dict[str, dict[str, Any]] = {}
    for _ in range(settings.repeat + 1):  # the first round warms up, and may count
        for name, (decoder, guide) in runners.items():
            engine, before = Engine(model, guide), guide.seconds if guide else 0.0
            start = time.perf_counter()
            found, work = engine.sample(requests, decoder=decoder, version=0, slots=settings.slots)
            result = {key: getattr(work, key) for key in ("forwards", "guide_calls", "guide_tokens", "guide_written")}
            result |= {"seconds": time.perf_counter() - start, "guide_seconds": guide.seconds - before if guide else 0.0}
            result["tokens"] = sum(len(t.events) for t in found)
            result["same_text"] = all(map(np.array_equal, (t.response_ids for t in found), (t.response_ids for t in texts)))
            best[name] = min(best.get(name, result), result, key=lambda r: r["seconds"])
    return best


def show(report: dict[str, Any]) -> None:
    results, settings = report["results"], report["settings"]
    plain = results[PLAIN]
    rows = []
    for name, r in results.items():
        work = (r["forwards"] + r["guide_calls"]) / plain["forwards"]
        call = f"{1e3 * r['guide_seconds'] / r['guide_calls']:.1f}" if r["guide_calls"] else ""
        step = f"{1e3 * (r['seconds'] - r['guide_seconds']) / r['forwards']:.1f}"
        times = (f"{r['seconds']:.3f}", f"{r['seconds'] / plain['seconds']:.2f}x")
        same = "yes" if r["same_text"] else "no"
        rows.append((name, str(r["forwards"]), str(r["guide_calls"]), f"{work:.2f}x", step, call, *times, same))
    columns = ("guide", "forwards", "calls", "both/plain", "ms a forward", "ms a call", "s", "s/plain", "plain text")
    facts = (
        f"base {settings['base']}, {settings['tokens_per_step']} a step, patience {settings['patience']}",
        f"n {settings['n']}, prompts up to {settings['prompt_len']}, responses of {settings['max_tokens']}",
        f"seed {settings['seed']}",
    )
    show_table(columns, rows, report, facts)
