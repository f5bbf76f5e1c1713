"""launch/submit.sh against a head node of our own. Run with `-m slow`."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SMALL = [
    "recipe=quickstart", "warm_start.steps=8", "eval.prompts=8", "algo.prompts_per_step=6", "algo.samples_per_prompt=4",
    "model.layers=2", "model.width=32", "model.heads=2", "model.mlp=64", "learner.threads=1", "monitor.wandb=disabled",
    f"verifier.name={ROOT / 'tests' / 'clue_verifier.py'}:share",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """A fresh, token-protected head, and nodes that join it. `environment`: of a client."""

    def __init__(self):
        self.folders = [tempfile.mkdtemp(prefix="r", dir="/tmp")]  # short names: they hold Unix sockets
        self.port, dashboard = free_port(), free_port()
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.environment["PATH"] = f"{BIN}{os.pathsep}{self.environment['PATH']}"
        self.environment.pop("PYTHONPATH", None)
        self.environment.pop("RAY_ADDRESS", None)
        self.nodes: list[subprocess.Popen] = []
        self.start("--head", f"--port={self.port}", f"--dashboard-port={dashboard}", f"--temp-dir={self.folders[0]}")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.2)
        self.environment["RAY_ADDRESS"] = f"http://127.0.0.1:{dashboard}"

    def start(self, *options: str, cpus: int = 4) -> None:
        command = [BIN / "ray", "start", "--block", f"--num-cpus={cpus}", "--object-store-memory=300000000", *options]
        command += [f"--dashboard-agent-listen-port={free_port()}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
        self.nodes.append(subprocess.Popen(command, env=environment, start_new_session=True, **quiet))

    def join(self, cpus: int) -> None:
        """One more node. It has folders of its own: unpacking a job's source, a node removes what is there, which in folders
        shared with the head would be what the driver runs from."""
        self.folders.append(tempfile.mkdtemp(prefix="r", dir="/tmp"))
        self.start(f"--address=127.0.0.1:{self.port}", f"--temp-dir={self.folders[-1]}", cpus=cpus)

    def close(self) -> None:
        for process in reversed(self.nodes):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.close()


def submitted(cluster: Cluster, *arguments: str, **variables: str) -> subprocess.Popen:
    command = ["bash", "launch/submit.sh", *arguments]
    environment = cluster.environment | variables
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def submit(cluster: Cluster, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """(exit code, output, errors) of launch/submit.sh."""
    process = submitted(cluster, *arguments, **variables)
    output, errors = process.communicate(timeout=400)
    return process.returncode, output, errors


def test_jobs_run_to_their_end_and_pass_their_exit_code_on(cluster, tmp_path):
    code, output, errors = submit(cluster, "recipe=quickstart", "help=true")
    assert code == 0 and "algo.prompts_per_step" in output, output + errors
    code, output, _ = submit(cluster, "recipe=quikstart")
    assert code == 2 and "did you mean quickstart" in output
    code, output, errors = submit(cluster, *SMALL, "steps=2", f"output_dir={tmp_path}", RLPIPE_RETRIES="0")
    assert code == 0, output[-3000:]
    assert "rlpipe.supervise" not in errors
    assert (tmp_path / "quickstart" / "latest" / "summary.json").is_file()


def steps_of(folder: Path) -> list[int]:
    """Steps in the metrics of the only run there, whole lines only."""
    text = "".join(path.read_text() for path in folder.glob("quickstart/2*/metrics.jsonl"))
    return [json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")]


def driver_of(folder: Path) -> psutil.Process:
    """The process of `python -m rlpipe.run` that writes there, neither its supervisor nor their shell."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words[1:3] == ["-m", "rlpipe.run"] and f"output_dir={folder}" in words:
            return process
    pytest.fail("no driver is running")


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while max(steps_of(folder), default=-1) < step:
        assert time.monotonic() < deadline and process.poll() is None, "".join(process.communicate(timeout=60))[-3000:]
        time.sleep(0.1)


def test_a_driver_that_is_killed_is_continued_on_two_nodes(cluster, tmp_path):
    """The job's driver gets SIGKILL twice; the job ends as if nothing had been, and in one and the same run."""
    cluster.join(cpus=4)
    process = submitted(
        cluster, *SMALL, "steps=12", "checkpoint.every=2", "eval.every=6", f"output_dir={tmp_path}", "rollout.cpus=2",
        "verifier.cpus=1", "cluster.start_timeout_s=120",
    )  # fmt: skip
    for step in (3, 7):
        wait_for_step(process, tmp_path, step)
        driver_of(tmp_path).kill()
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:] + errors[-3000:]
    deaths = re.findall(r"attempt (\d) was killed by SIGKILL after step (\d+)", output)
    assert [attempt for attempt, _ in deaths] == ["1", "2"] and 3 <= int(deaths[0][1]) < int(deaths[1][1]), output[-3000:]
    assert output.count("resumed from") == 2
    (run,) = tmp_path.glob("quickstart/2*")
    assert steps_of(tmp_path) == list(range(13)), "every step is there once"
    assert json.loads((run / "summary.json").read_text())["steps"] == 12


def test_a_job_that_is_stopped_saves_first(cluster, tmp_path):
    """Ray signals every process of the job: the run, its supervisor, the shell of both."""
    process = submitted(cluster, *SMALL, "steps=500", "checkpoint.every=0", "eval.every=0", f"output_dir={tmp_path}")
    wait_for_step(process, tmp_path, 2)
    job = next(line for line in process.stderr if line.startswith("job ")).split()[1]
    subprocess.run([BIN / "ray", "job", "stop", job], env=cluster.environment, check=True, capture_output=True, timeout=200)
    output, errors = process.communicate(timeout=200)
    assert process.returncode != 0 and "stopped" in errors, output[-3000:] + errors[-3000:]
    assert "SIGTERM asked the run to end" in output and "attempt" not in output
    (run,) = tmp_path.glob("quickstart/2*")
    assert (run / "checkpoints" / f"step_{steps_of(tmp_path)[-1]:06d}" / "driver.json").is_file()
