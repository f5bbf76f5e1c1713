"""`python -m rlpipe.bench overlap [key=value …]`: how long a step takes when sampling and updating take given times.

Stand-ins of rollout workers and learner ranks sleep for as long as they are told; driver, feed, pools, verifiers and Ray are
the real ones. A synchronous step takes as long as both together, an asynchronous one as long as the longer of the two.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.bench.driver import Anywhere, HostedLearner, HostedRollouts, Quiet, Stopwatch, Unevaluated, Versions
from rlpipe.bench.settings import read
from rlpipe.bench.stand_ins import Prompts, RankHost, Work, host_rollouts
from rlpipe.config import RunConfig
from rlpipe.crew import Crew
from rlpipe.data.source import Cursor
from rlpipe.learner.group import CONTROL
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.monitor.overlap import use_of
from rlpipe.monitor.spans import read_trace
from rlpipe.verifiers.pool import VerifierPool

HEAD = (
    f"{'':<20}{'rollout s':>10}{'update s':>10}{'step s':>9}{'of the longer':>15}{'of the sum':>12}{'wait s':>9}{'overlap':>9}"
)


@dataclass
class OverlapSettings:
    rollout_s: float = 1.0  # that sampling a step's responses takes
    update_s: float = 1.0  # that an update takes
    workers: int = 4  # rollout workers; each samples one unit a step
    steps: int = 12  # the first two and the last are not counted: the pipeline fills and empties
    samples: int = 4  # responses to a prompt
    response_len: int = 64  # tokens
    max_lag: int = 1  # of the asynchronous run
    out: str = ""  # a JSON file for the results


class SlowRank(RankHost):
    """A learner rank whose updates take their time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def train(self, shard: Any) -> dict[str, Any]:
        time.sleep(self.seconds)
        return super().train(shard)


class SlowLearner(HostedLearner):
    def __init__(self, cfg: RunConfig, seconds: float):
        import ray

        self.cfg, self.config, self.parameters = cfg, cfg.learner, 0
        actor = ray.remote(concurrency_groups={CONTROL: 1})(SlowRank)
        self.workers = [actor.options(num_cpus=0).remote(seconds)]


class Lines(Quiet):
    """A monitor that keeps the metrics of every step."""

    def __init__(self, timeline: Stopwatch):
        super().__init__(timeline)
        self.steps: list[dict[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float], *more: Any) -> None:
        if "perf/step_s" in metrics:
            self.steps.append(dict(metrics))


def main(arguments: Sequence[str]) -> None:
    """A synchronous and an asynchronous run in one process; prints a line each and writes `out`."""
    from rlpipe import cluster

    settings = read(arguments, OverlapSettings)
    cfg = run_config(settings, "sync")
    cluster.connect(cfg.cluster, need_cpus=1, need_gpus=0)
    runs = []
    try:
        print(HEAD, flush=True)
        for mode in ("sync", "async"):
            runs.append(measure(settings, mode))
            print(line(runs[-1], settings), flush=True)
    finally:
        cluster.disconnect()
    report = {"settings": dataclasses.asdict(settings), "runs": runs}
    report |= {"machine": machine_facts(), "versions": package_versions()}
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")


def run_config(settings: OverlapSettings, mode: str) -> RunConfig:
    cfg = RunConfig(name="bench", mode=mode, max_lag=settings.max_lag, steps=settings.steps)
    cfg.algo.prompts_per_step, cfg.algo.samples_per_prompt = settings.workers, settings.samples
    cfg.algo.updates_per_step = 1
    cfg.rollout.workers, cfg.rollout.batch_size = settings.workers, settings.samples
    cfg.rollout.decoder.max_tokens, cfg.monitor.samples = settings.response_len, 0
    cfg.cluster.address = "local"
    return cfg


def measure(settings: OverlapSettings, mode: str) -> dict[str, Any]:
    """One run: seconds of a step and of its wait for groups (medians), and of the learner's time the share in which a rollout
    worker was busy too."""
    import ray

    cfg = run_config(settings, mode)
    work = Work(settings.samples, 16, settings.response_len, settings.rollout_s)
    hosts, make = host_rollouts(work, settings.workers, settings.workers)
    with tempfile.TemporaryDirectory() as folder:
        watch = Stopwatch(Path(folder) / "timeline.json")
        spans = lambda index, name, start, end, ok: watch.span(f"rollout {index}", name, start, end, ok=ok)  # noqa: E731
        rollouts = HostedRollouts(cfg, make, spans)
        verifiers = VerifierPool(cfg.verifier, Prompts.verifier, Anywhere())
        crew = Crew(SlowLearner(cfg, settings.update_s), None, rollouts, verifiers, Versions(rollouts))
        source, lines = Prompts(), Lines(watch)
        try:
            Unevaluated(cfg, lines, source, Cursor(source), crew, lines).run()
        finally:
            crew.close()
            watch.close()
            for host in hosts:
                ray.kill(host)
        counted = lines.steps[2:-1]
        return {
            "mode": mode,
            "step_s": statistics.median(step["perf/step_s"] for step in counted),
            "wait_s": statistics.median(step["perf/wait_s"] for step in counted),
            "overlap": use_of(read_trace(Path(folder)), 3, settings.steps - 1).overlap,
        }


def line(run: dict[str, Any], settings: OverlapSettings) -> str:
    both, step = (settings.rollout_s, settings.update_s), run["step_s"]
    name = run["mode"] if run["mode"] == "sync" else f"async, max_lag {settings.max_lag}"
    return (
        f"{name:<20}{both[0]:>10.2f}{both[1]:>10.2f}{step:>9.3f}{step / max(both):>15.2f}{step / sum(both):>12.2f}"
        f"{run['wait_s']:>9.3f}{run['overlap']:>9.2f}"
    )
