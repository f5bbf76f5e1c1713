"""`python -m rlpipe.bench sync [key=value …]`: what it takes to bring a policy's weights to the rollout workers, by every way.

Ranks and workers are real processes with a real model under DeepSpeed; weights change between versions, and after each all
workers must hold the learner's, or the bench fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlpipe import cluster
from rlpipe.actor_pool import ActorPool
from rlpipe.bench import models
from rlpipe.bench.live_bytes import LiveBytes
from rlpipe.bench.settings import read
from rlpipe.bench.table import show_table
from rlpipe.config import ClusterConfig, LearnerConfig, RolloutConfig, RunConfig
from rlpipe.errors import ConfigError, WeightMismatch
from rlpipe.learner.exporting import ADAPTERS, BROADCAST, SHARED, WHOLE, Exporter, ExportingRank, ExportingRanks, Receipt
from rlpipe.models.weights import Layout
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.rollout.pool import CONTROL, CONTROL_CALLS, RolloutPool
from rlpipe.transport.update import Facts, Receiver, WeightUpdate
from rlpipe.weight_sync import STORE, WeightSync

TIMEOUT_S = 600.0
STEP = 1.001  # what weights are multiplied by between versions


@dataclass
class SyncSettings:
    model: str = "3m"  # as of the rollout bench, and 135m: SmolLM2's shape with random weights
    transports: str = "store,broadcast,shared"
    ranks: int = 1  # of the learner
    zero_stage: int = 1  # 0 to 3
    workers: int = 2  # of rollout
    lora: int = 0  # rank of adapters; 0: all weights are sent
    bucket_mb: int = 64
    repeat: int = 5  # versions by each way that are timed, after two that are not
    device: str = "cpu"  # cpu | cuda
    dtype: str = "auto"  # float32 | bfloat16; auto: float32 on a CPU, bfloat16 on a GPU
    seed: int = 0
    out: str = ""  # a JSON file for the results

    @property
    def number(self) -> str:
        return self.dtype if self.dtype != "auto" else ("float32" if self.device == "cpu" else "bfloat16")


class Source(ExportingRank):
    """A rank with the model under DeepSpeed."""

    def __init__(self, rank: int, settings: SyncSettings):
        torch.set_num_threads(1)
        self.rank, self.settings, self.live = rank, settings, nullcontext()

    def address(self) -> str:
        from rlpipe.transport.meeting import serve

        return serve("127.0.0.1", TIMEOUT_S)[1]

    def start(self, master: str) -> int:
        """Join the others; returns the number of parameters."""
        from rlpipe.learner.engine import Engine, join_process_group
        from rlpipe.models.adapters import add_adapters

        given = self.settings
        join_process_group(self.rank, given.ranks, master, TIMEOUT_S)
        model = models.build(given.model, device=given.device, dtype=given.number, seed=given.seed)
        parameters = sum(p.numel() for p in model.parameters())
        if given.lora:
            add_adapters(model.lm, rank=given.lora, alpha=given.lora, dropout=0.0, targets=LearnerConfig().lora_targets)
        config = LearnerConfig(workers=given.ranks, zero_stage=given.zero_stage, bucket_mb=given.bucket_mb)
        self.exporter = Exporter(Engine(model, config, 1e-6, 1, "bench"), given.bucket_mb * 2**20)
        return parameters

    @torch.no_grad()
    def move(self) -> None:
        """As an optimizer would, in each rank's own part."""
        for parameter in self.exporter.engine.model.parameters():
            if parameter.requires_grad:
                (parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter).mul_(STEP)

    def weights_send(self, contents: str) -> Receipt:
        with self.live:
            return super().weights_send(contents)

    def weights_put(self, contents: str) -> Iterator[Any]:
        with self.live:
            yield from super().weights_put(contents)

    def count(self, on: bool) -> int:
        """Whether tensors are counted from now on; the peak so far."""
        peak = getattr(self.live, "peak", 0)
        self.live = LiveBytes() if on else nullcontext()
        return peak

    def digest(self) -> list[int]:
        """Of the whole model, adapters merged, bucket by bucket; on rank 0."""
        from rlpipe.models.weights import digest

        exported = self.exporter.engine.export(self.exporter.bucket_bytes)
        return [digest(torch.from_numpy(bucket)) for bucket, _ in exported if bucket is not None]


class Taker:
    """A rollout worker's model, and what receives its weights."""

    def __init__(self, settings: SyncSettings):
        torch.set_num_threads(1)
        self.model = models.build(settings.model, device=settings.device, dtype=settings.number, seed=settings.seed + 1).lm
        self.weights, self.bucket_bytes, self.live = Receiver(), settings.bucket_mb * 2**20, nullcontext()

    def pid(self) -> int:
        return os.getpid()

    def load_weights(self, update: WeightUpdate) -> tuple[int, str]:
        with self.live:
            return self.weights.receive(update, self.model)

    def count(self, on: bool) -> int:
        """Whether tensors are counted from now on; the peak so far."""
        peak = getattr(self.live, "peak", 0)
        self.live = LiveBytes() if on else nullcontext()
        return peak

    def weights_facts(self) -> Facts:
        return self.weights.facts()

    def put_weights(self, version: int, layout: Layout):
        yield from self.weights.put(version, layout, self.model)

    def digest(self) -> list[int]:
        from rlpipe.models.weights import digest, pack

        found = []
        named = dict(self.model.named_parameters())
        layout = Layout.plan(((name, p.dtype, tuple(p.shape)) for name, p in named.items()), self.bucket_bytes)
        for entries, size in zip(layout.buckets(), layout.sizes, strict=True):
            bucket = torch.empty(size, dtype=torch.uint8)
            pack((named[entry.name] for entry in entries), entries, bucket)
            found.append(digest(bucket))
        return found


class Sources(ExportingRanks):
    """All ranks, started."""

    def __init__(self, settings: SyncSettings):
        import ray

        variables = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if settings.device == "cpu":
            variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        options = {"num_cpus": 0.1, "num_gpus": float(settings.device == "cuda"), "runtime_env": {"env_vars": variables}}
        actor = ray.remote(Source).options(**options)
        self.workers = [actor.remote(rank, settings) for rank in range(settings.ranks)]
        master = self._wait([self.workers[0].address.remote()], "rank 0")[0]
        self.parameters = self.all("start", master)[0]

    def _wait(self, references: list, what: str) -> list:
        return cluster.wait(references, what=what, timeout_s=TIMEOUT_S)

    def all(self, method: str, *arguments: Any) -> list:
        return self._wait([getattr(worker, method).remote(*arguments) for worker in self.workers], method)


class Takers(RolloutPool):
    """The pool of a run, around workers that only take weights."""

    def __init__(self, settings: SyncSettings):
        import ray

        self.cfg, self.version, self.at_once = RolloutConfig(timeout_s=TIMEOUT_S), -1, False
        actor = ray.remote(concurrency_groups={CONTROL: CONTROL_CALLS})(Taker)
        options = {"num_cpus": 0.1, "num_gpus": float(settings.device == "cuda")}
        make = actor.options(**options, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}).remote
        self.pool = ActorPool(lambda index: make(settings), settings.workers, name="rollout", retries=0, group=CONTROL)


def main(arguments: Sequence[str]) -> None:
    """Run, print the table, write `out`. Raises ConfigError before anything runs."""
    import ray

    settings = read(arguments, SyncSettings)
    known = (STORE, BROADCAST, SHARED)
    for name in settings.transports.split(","):
        if name not in known:
            raise ConfigError(f"transports={settings.transports}: known are {', '.join(known)}")
    if settings.zero_stage > 3:
        raise ConfigError(f"zero_stage={settings.zero_stage}: DeepSpeed has 0 to 3")
    size = 4 * 134.5e6 if settings.model == "135m" else 2e8
    processes = settings.ranks + settings.workers
    need = {"need_cpus": processes * 0.1 + 1, "need_gpus": float(processes if settings.device == "cuda" else 0)}
    takers, ours = None, not ray.is_initialized()
    cluster.connect(ClusterConfig(address="local", object_store_mb=int(4 * size / 2**20)), **need)
    try:
        sources, takers = Sources(settings), Takers(settings)
        results = {name: measure(name, settings, sources, takers) for name in settings.transports.split(",")}
        report = {
            "settings": dataclasses.asdict(settings) | {"dtype": settings.number, "threads": 1},
            "parameters": sources.parameters,
            "transports": results,
            "machine": machine_facts(),
            "versions": package_versions(),
        }
    finally:
        if takers is not None:
            takers.close()
        if ours:
            cluster.disconnect()
    show(report)
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")


def measure(transport: str, settings: SyncSettings, sources: Sources, takers: Takers) -> dict[str, Any]:
    """One way. bytes: of a version · buckets, gathers (of one version) · seconds: median of `repeat`, until all workers have it
    · largest_bucket · learner_peak: bytes on rank 0 at a time, of tensors as counted, or of buckets and what is gathered for
    them if that is more (buckets lie in memory that torch does not make) · worker_peak: of tensors made on a worker."""
    cfg = RunConfig(rollout=RolloutConfig(transport=transport, timeout_s=TIMEOUT_S))
    sync = WeightSync(cfg, sources, takers)
    contents = ADAPTERS if settings.lora else WHOLE
    version, seconds, fallbacks = takers.version + 1, [], 0.0
    for _ in range(2 + settings.repeat):
        sources.all("move")
        started = time.perf_counter()
        fallbacks += sync.publish(version)["perf/sync_fallbacks"]
        seconds.append(time.perf_counter() - started)
        verify(sources, takers, version)
        version += 1
    _count(sources, takers, True)
    sync.publish(version)
    layout, receipt = sources.weights_plan(contents)[0], sync.receipt
    learner_peak, worker_peak = _count(sources, takers, False)
    sync.forget()
    return {
        "bytes": layout.nbytes,
        "buckets": len(layout.sizes),
        "gathers": receipt.gathers,
        "seconds": statistics.median(seconds[2:]),
        "rounds": seconds,
        "fallbacks": fallbacks,
        "largest_bucket": layout.largest,
        "learner_peak": max(learner_peak, receipt.peak_bytes),
        "worker_peak": worker_peak,
    }


def _count(sources: Sources, takers: Takers, on: bool) -> tuple[int, int]:
    """Count tensors on all sides, or not; the peaks so far, on rank 0 and on any worker."""
    there = takers.each("count", on, timeout_s=TIMEOUT_S, what="counting tensors")
    return sources.all("count", on)[0], max(there.values())


def verify(sources: Sources, takers: Takers, version: int) -> None:
    """Raises WeightMismatch unless every worker's weights are the learner's, to the bit."""
    right = sources.all("digest")[0]
    for worker, found in takers.each("digest", timeout_s=TIMEOUT_S, what="comparing weights").items():
        if found != right:
            raise WeightMismatch(f"version {version}: worker {worker} holds other weights than the learner")


def show(report: dict[str, Any]) -> None:
    rows = []
    for name, r in report["transports"].items():
        peaks = [f"{r[key] / max(1, r['largest_bucket']):.2f}" for key in ("learner_peak", "worker_peak")]
        each = f"{r['gathers'] / r['buckets']:g}"
        rate = f"{r['bytes'] / r['seconds'] / 1e6:,.0f}"
        rows.append((name, f"{r['bytes'] / 1e6:,.1f}", str(r["buckets"]), f"{r['seconds'] * 1e3:,.0f}", rate, each, *peaks))
    columns = ("", "MB", "buckets", "ms", "MB/s", "gathers a bucket", "peak, rank 0", "peak, worker")
    given = report["settings"]
    facts = (f"{given['ranks']} rank(s) at ZeRO {given['zero_stage']}", f"{given['workers']} workers", "peaks in buckets")
    show_table(columns, rows, report, facts)
