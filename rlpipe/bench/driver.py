"""`python -m rlpipe.bench driver [key=value …]`: what a trajectory costs the driver, from 8 to 512 rollout workers.

Rollout and learner workers are stand-ins that answer at once (`stand_ins`), many to a process. Everything else is the real
thing: the driver's loop, feed, pools, verifier processes, planning of rows, shards, the timeline, Ray's calls and object store.
Nothing is evaluated, shown or checkpointed: what those cost does not depend on how many trajectories there are.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlpipe.actor_pool import ActorPool
from rlpipe.bench.settings import read
from rlpipe.bench.stand_ins import Prompts, RankHost, Weights, Work, host_rollouts
from rlpipe.config import RunConfig
from rlpipe.crew import Crew
from rlpipe.data.source import Cursor
from rlpipe.driver import Driver
from rlpipe.errors import ConfigError
from rlpipe.learner.group import CONTROL, LearnerGroup
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.monitor.timeline import Timeline
from rlpipe.rollout.pool import RolloutPool
from rlpipe.verifiers.pool import VerifierPool

log = logging.getLogger("rlpipe")

PARTS = {"wait for groups": "take", "plan": "plan", "update": "train", "version": "publish"}  # by how their spans begin
THREADS = ("main", "rollout pool", "verifier pool", "timeline")


@dataclass
class DriverSettings:
    workers: str = "8,32,128,512"  # rollout workers, one run after the other
    trajectories: int = 25_000  # of each run
    samples: int = 8  # responses to a prompt
    unit: int = 16  # responses of a unit of work
    prompt_len: int = 128  # tokens
    response_len: int = 512  # tokens
    seconds: float = 0.0  # that a worker takes for a unit; 0: none, so that the driver is what everything waits for
    verifiers: int = 2  # processes, real ones
    ranks: int = 4  # of the learner
    per_process: int = 64  # rollout workers that share one
    max_lag: int = 1  # versions
    least_prompts: int = 64  # of a step; with many workers it has as many as keep them all busy
    object_store_mb: int = 2048
    out: str = ""  # a JSON file for the results

    @property
    def counts(self) -> list[int]:
        """Raises ConfigError unless workers is a list of whole numbers above 0."""
        try:
            counts = [int(part) for part in self.workers.split(",")]
        except ValueError:
            counts = []
        if not counts or min(counts) < 1:
            raise ConfigError(f"workers={self.workers}: write numbers with commas between them, such as 8,32,128")
        if self.unit % self.samples:
            raise ConfigError(f"unit={self.unit} must be a multiple of samples={self.samples}: units hold whole groups")
        return counts

    def run_config(self, workers: int) -> RunConfig:
        """A run in which all workers have work: as many prompts under way as they hold, max_lag + 1 steps of them."""
        cfg = RunConfig(name="bench", mode="async", max_lag=self.max_lag)
        under_way = workers * (self.unit // self.samples)
        cfg.algo.prompts_per_step = max(self.least_prompts, -(-under_way // (self.max_lag + 1)))
        cfg.algo.samples_per_prompt = self.samples
        cfg.steps = max(1, round(self.trajectories / (cfg.algo.prompts_per_step * self.samples)))
        cfg.rollout.workers, cfg.rollout.batch_size = workers, self.unit
        cfg.rollout.decoder.max_tokens = self.response_len
        cfg.verifier.workers, cfg.learner.workers = self.verifiers, self.ranks
        cfg.learner.token_budget, cfg.monitor.samples = 32_768, 0
        return cfg


def main(arguments: Sequence[str]) -> None:
    """One run a number of workers; prints a line each and writes `out`."""
    from rlpipe import cluster

    settings = read(arguments, DriverSettings)
    counts = settings.counts
    cfg = settings.run_config(counts[0])
    cfg.cluster.object_store_mb, cfg.cluster.address = settings.object_store_mb, "local"
    runs = []
    cluster.connect(cfg.cluster, need_cpus=1, need_gpus=0)
    try:
        print(HEAD, flush=True)
        for workers in counts:
            runs.append(measure(settings, workers))
            print(line(runs[-1]), flush=True)
    finally:
        cluster.disconnect()
    report = {"settings": dataclasses.asdict(settings), "runs": runs}
    report |= {"machine": machine_facts(), "versions": package_versions()}
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")


class Anywhere:
    """A placement without bundles: stand-ins need no room."""

    def options(self, role: str, index: int) -> dict[str, Any]:
        return {"num_cpus": 0}

    def ready(self, role: str, index: int) -> bool:
        return True


class Stopwatch(Timeline):
    """The timeline, and the processor seconds of the loop's parts."""

    def __init__(self, path: Path):
        super().__init__(path, warn=log.warning)
        self.seconds = dict.fromkeys(PARTS.values(), 0.0)

    @contextmanager
    def timed(self, track: str, name: str, **args: Any) -> Iterator[dict[str, Any]]:
        part = next((part for begin, part in PARTS.items() if name.startswith(begin)), "")
        before = time.thread_time()
        with super().timed(track, name, **args) as more:
            yield more
        if part:
            self.seconds[part] += time.thread_time() - before


class Quiet:
    """A monitor that shows nothing, and a place for checkpoints that keeps none."""

    def __init__(self, timeline: Timeline):
        self.timeline = timeline

    def warn(self, text: str) -> None:
        log.warning("%s", text)

    def nothing(self, *given: Any, **named: Any) -> dict[str, float]:
        return {}

    memory = prompts = log = incident = state = save = finish = metrics = close = check = nothing


class HostedRollouts(RolloutPool):
    """The pool of rollout workers over stand-ins."""

    def __init__(self, cfg: RunConfig, make: Callable[[int], Any], spans: Callable):
        self.cfg, self.seed, self.version, self.at_once = cfg.rollout, cfg.seed, -1, True
        self._units = itertools.count(1)
        self.pool = ActorPool(make, cfg.rollout.workers, name="rollout", retries=0, group=CONTROL, spans=spans)

    def close(self) -> None:
        """The hosts are ended by whoever made them."""
        with self.pool.changed:
            self.pool.has_place = lambda index: False
            for slot in self.pool.slots:
                slot.gone(0.0)
        self.pool.close()


class HostedLearner(LearnerGroup):
    """The learner's ranks over stand-ins."""

    def __init__(self, cfg: RunConfig):
        import ray

        self.cfg, self.config, self.parameters = cfg, cfg.learner, 0
        actor = ray.remote(concurrency_groups={CONTROL: 1})(RankHost)
        self.workers = [actor.options(num_cpus=0).remote() for _ in range(cfg.learner.workers)]


class Versions:
    """In the place of `WeightSync`: every version reaches the workers, and there is nothing in it."""

    def __init__(self, rollouts: RolloutPool):
        self.rollouts = rollouts

    def forget(self) -> None:
        """There is nothing to forget."""

    def publish(self, version: int, wait: bool = True) -> dict[str, float]:
        self.rollouts.set_weights(Weights(version), wait=wait)
        return {}


class Unevaluated(Driver):
    """The driver, and its memory after every step."""

    def run(self) -> dict[str, Any]:
        self.memory, self.trajectories = [resident_mb()], 0
        return super().run()

    def evaluate(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics | {"eval/accuracy": 0.0}

    def report(self, harvest: Any, metrics: dict[str, float]) -> None:
        super().report(harvest, metrics)
        self.trajectories += len(harvest.trajectories)
        self.memory.append(resident_mb())


def measure(settings: DriverSettings, workers: int) -> dict[str, Any]:
    """One run; see `spent_by`."""
    import ray

    cfg = settings.run_config(workers)
    work = Work(settings.samples, settings.prompt_len, settings.response_len, settings.seconds)
    hosts, make = host_rollouts(work, workers, settings.per_process)
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch(Path(folder) / "timeline.json")
        spans = lambda index, name, start, end, ok: watch.span(f"rollout {index}", name, start, end, ok=ok)  # noqa: E731
        rollouts = HostedRollouts(cfg, make, spans)
        verifiers = VerifierPool(cfg.verifier, Prompts.verifier, Anywhere(), spans=spans)
        crew = Crew(HostedLearner(cfg), None, rollouts, verifiers, Versions(rollouts))
        source, quiet = Prompts(), Quiet(watch)
        try:
            return {"workers": workers} | spent_by(Unevaluated(cfg, quiet, source, Cursor(source), crew, quiet), watch)
        finally:
            crew.close()
            watch.close()
            for host in hosts:
                ray.kill(host)


def spent_by(driver: Unevaluated, watch: Stopwatch) -> dict[str, Any]:
    """Of the driver's whole run. Names with _us are microseconds of processor time of its process per trajectory; cpu: in all,
    threads: of its Python threads (main: the loop; the pools' own) and of the rest (Ray's), python: of the former together,
    which take turns; loop: of the parts of the loop. trajectories_per_s: by the clock, whatever else the machine does.
    resident_mb: before the first step and after each."""
    gc.collect()
    threads, spent, started = thread_seconds(), time.process_time(), time.perf_counter()
    driver.run()
    wall, spent = time.perf_counter() - started, time.process_time() - spent
    count, after = driver.trajectories, thread_seconds()
    python = {name: (after.get(name, 0.0) - threads.get(name, 0.0)) * 1e6 / count for name in THREADS}
    loop = {name: seconds * 1e6 / count for name, seconds in watch.seconds.items()}
    cpu = spent * 1e6 / count
    return {
        "steps": driver.step,
        "prompts_per_step": driver.cfg.algo.prompts_per_step,
        "trajectories": count,
        "seconds": wall,
        "trajectories_per_s": count / wall,
        "cpu_us": cpu,
        "python_us": sum(python.values()),
        "threads_us": python | {"rest": max(0.0, cpu - sum(python.values()))},
        "loop_us": loop | {"other": max(0.0, python["main"] - sum(loop.values()))},
        "resident_mb": driver.memory,
        "growth_mb_per_1000": growth(driver.memory, count),
    }


def thread_seconds() -> dict[str, float]:
    """Processor seconds of each of this process's Python threads so far, by name; MainThread is called main."""
    tick, found = os.sysconf("SC_CLK_TCK"), {}
    for thread in threading.enumerate():
        try:
            fields = Path(f"/proc/self/task/{thread.native_id}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        name = "main" if thread is threading.main_thread() else thread.name
        found[name] = found.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / tick
    return found


def resident_mb() -> float:
    """MB of this process's own memory; pages of the object store that it looks at are not its own."""
    for entry in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if entry.startswith("RssAnon:"):
            return int(entry.split()[1]) / 1024
    return 0.0


def growth(memory: Sequence[float], trajectories: int) -> float:
    """MB per 1000 trajectories by which memory (a value a step) rose over the second half of a run, by least squares."""
    late = np.asarray(memory[len(memory) // 2 :])
    if len(late) < 2:
        return 0.0
    return float(np.polyfit(np.arange(len(late)), late, 1)[0]) * (len(memory) - 1) / trajectories * 1000


HEAD = (
    f"{'workers':>8}{'trajectories':>14}{'per s':>8}{'CPU µs each':>13} = {'main':>6}{'rollout pool':>14}{'verifier pool':>15}"
    f"{'rest':>6}   main ={'take':>6}{'plan':>6}{'train':>7}{'publish':>9}{'other':>7}{'MB':>12}"
)


def line(run: dict[str, Any]) -> str:
    threads, loop, memory = run["threads_us"], run["loop_us"], run["resident_mb"]
    early = memory[-(-len(memory) // 10)]
    return (
        f"{run['workers']:>8}{run['trajectories']:>14}{run['trajectories_per_s']:>8.0f}{run['cpu_us']:>13.0f} = "
        f"{threads['main']:>6.0f}{threads['rollout pool']:>14.0f}{threads['verifier pool']:>15.0f}"
        f"{threads['rest'] + threads['timeline']:>6.0f}         {loop['take']:>6.0f}{loop['plan']:>6.0f}{loop['train']:>7.0f}"
        f"{loop['publish']:>9.0f}{loop['other']:>7.0f}{early:>6.0f} → {memory[-1]:.0f}"
    )
