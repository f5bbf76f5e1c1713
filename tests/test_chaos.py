"""A run under fire: a cluster of three nodes on which workers, ranks, a node and the driver are killed at random.

Slow and opt-in: `bash launch/test.sh -m chaos`. What it takes and what it killed is printed with -s.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3000)]
ROOT = Path(__file__).resolve().parent.parent
STEPS = 40
KILLS = {"rollout": 6, "verifier": 3, "learner": 3, "node": 1, "driver": 3}  # of each run
ACTORS = {"rollout": "ray::RolloutWorker", "verifier": "ray::VerifierWorker", "learner": "ray::LearnerWorker"}
NODE_CPUS = 2  # two nodes are enough for all workers, one is not
RECIPE = [
    "recipe=quickstart", f"steps={STEPS}", "eval.every=20", "checkpoint.every=2", "learner.workers=2", "learner.threads=1",
    "learner.restarts=20", "rollout.workers=3", "rollout.min_workers=1", "rollout.cpus=0.6", "learner.cpus=0.6",
    "monitor.wandb=disabled", "monitor.samples=2",
]  # fmt: skip


@dataclass
class Nodes:
    """Three nodes on this machine, the head among them, which is never killed: it keeps Ray's own state."""

    def __post_init__(self):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": NODE_CPUS, "object_store_memory": 2**28})
        self.others = [self.add() for _ in range(2)]
        self.cluster.wait_for_nodes()

    def add(self):
        return self.cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=2**28)

    def replace_one(self, rng: random.Random) -> str:
        victim = self.others.pop(rng.randrange(len(self.others)))
        self.cluster.remove_node(victim, allow_graceful=False)
        self.others.append(self.add())
        return victim.node_id[:8]

    def shutdown(self):
        self.cluster.shutdown()


@dataclass
class Run:
    """A supervised run in a process of its own, and the one who shoots at it."""

    folder: Path
    nodes: Nodes
    overrides: list[str]
    seed: int
    killed: list[tuple[str, str]] = field(default_factory=list)

    def start(self) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"PYTHONUNBUFFERED": "1", "RAY_AUTH_MODE": "disabled"}
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "rlpipe.supervise", *self.supervised, *RECIPE, *self.overrides]
        command += [f"cluster.address={self.nodes.cluster.address}", f"output_dir={self.folder}", "run_id=chaos"]
        console = (self.folder / "console.txt").open("a")
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT)
        return self.process

    supervised = ["retries=20", "--", sys.executable, "-m", "rlpipe.run"]

    @property
    def run_dir(self) -> Path:
        return self.folder / "quickstart" / "chaos"

    def step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else -1

    def victims(self, kind: str) -> list[psutil.Process]:
        if kind == "driver":
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [p for p in children if "rlpipe.run" in " ".join(_command(p))]
        children = psutil.Process().children(recursive=True)
        return [p for p in children if " ".join(_command(p)[:1]).startswith(ACTORS[kind])]

    def kill(self, kind: str, rng: random.Random) -> bool:
        if kind == "node":
            self.killed.append((kind, self.nodes.replace_one(rng)))
            return True
        victims = sorted(self.victims(kind), key=lambda p: p.pid)
        if not victims:
            return False
        victim = rng.choice(victims)
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False
        self.killed.append((kind, str(victim.pid)))
        return True

    def under_fire(self) -> int:
        """Shoot whenever the run has made progress (or has not, for a while), until all shots are spent; its exit code."""
        rng = random.Random(self.seed)
        shots = [kind for kind, count in KILLS.items() for _ in range(count)]
        rng.shuffle(shots)
        last, since = 0, time.monotonic()
        while self.process.poll() is None:
            time.sleep(0.05)
            step = self.step()
            patient = 45.0 if step < 1 else 20.0
            due = step >= 1 and (step >= last + 2 or time.monotonic() - since > patient)
            if shots and due:
                time.sleep(rng.random())
                if self.kill(shots[0], rng):
                    print(f"{time.strftime('%H:%M:%S')} step {step}: killed {' '.join(self.killed[-1])}", flush=True)
                    shots.pop(0)
                    last, since = self.step(), time.monotonic()
        assert not shots, f"the run ended with {shots} unspent"
        return self.process.returncode


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [process.name()]
    except psutil.Error:
        return [""]


@pytest.fixture(scope="module")
def nodes():
    made = Nodes()
    yield made
    made.shutdown()


def prompts(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "prompts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [index for line in lines for fate in ("trained", "without_signal", "failed") for index in line[fate]]


def check(run: Run, code: int) -> dict:
    """What must be true of every run that was under fire; its summary."""
    console = (run.folder / "console.txt").read_text()
    assert code == 0, console[-4000:]
    used = prompts(run.run_dir)
    final = run.run_dir / "checkpoints" / f"step_{STEPS:06d}"
    state = json.loads((final / "driver.json").read_text())
    assert len(used) == len(set(used)), "a prompt was used twice"
    assert sorted({*used, *state["pending"]}) == list(range(state["cursor"]["index"])), "a prompt was lost"
    assert not set(used) & set(state["pending"])
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["eval_final"] - summary["eval_start"] >= 0.25
    log = (run.run_dir / "log.txt").read_text()
    counts = {kind: sum(k == kind for k, _ in run.killed) for kind in KILLS}
    for kind in ("rollout", "verifier"):
        assert log.count(f"{kind} worker") and log.count("is replaced") >= 1, f"no word of a dead {kind} worker"
    cluster = summary["cluster"]
    assert cluster["rollbacks"] >= 1 and cluster["resumes"] >= counts["driver"] and cluster["restarts"] >= 4, cluster
    assert log.count("learner lost") == cluster["rollbacks"]
    return summary


def test_training_survives_and_loses_nothing(nodes, tmp_path):
    """Synchronous: the undisturbed run's numbers and weights, to the bit. Asynchronous: every prompt once, and it learns."""
    calm = Run(tmp_path / "calm", nodes, [], 0)
    assert calm.start().wait(timeout=900) == 0, (calm.folder / "console.txt").read_text()[-4000:]
    killed = 0
    for name, overrides in (("sync", []), ("async", ["mode=async", "max_lag=1"])):
        run, started = Run(tmp_path / name, nodes, overrides, seed=len(name)), time.monotonic()
        run.start()
        summary = check(run, run.under_fire())
        killed += len(run.killed)
        print(
            f"{name}: {len(run.killed)} kills in {time.monotonic() - started:.0f} s; {summary['eval_start']:.3f} → "
            f"{summary['eval_final']:.3f}; {summary['cluster']}",
            flush=True,
        )
        if name == "sync":
            assert timeless(run.run_dir) == timeless(calm.run_dir)
            ours, theirs = (
                r.run_dir / "checkpoints" / f"step_{STEPS:06d}" / "model" / "model.safetensors" for r in (run, calm)
            )
            assert ours.read_bytes() == theirs.read_bytes()
        else:
            lags = [json.loads(line).get("rollout/lag_max", 0) for line in (run.run_dir / "metrics.jsonl").open()]
            assert max(lags) == 1
    assert killed >= 30


def timeless(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "cluster/"))} for line in lines]
