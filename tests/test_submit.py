"""launch/submit.sh against a head node of our own. Run with `-m slow`."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head():
    """The environment of a client of a fresh, token-protected head."""
    folder, dashboard = tempfile.mkdtemp(prefix="r", dir="/tmp"), free_port()  # short: it holds Unix sockets
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    environment.pop("PYTHONPATH", None)
    command = [BIN / "ray", "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}"]
    options = [
        f"--dashboard-agent-listen-port={free_port()}",
        f"--temp-dir={folder}",
        "--num-cpus=4",
        "--object-store-memory=300000000",
    ]
    process = subprocess.Popen(
        [*command, *options], env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                break
        time.sleep(0.2)
    yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", "launch/submit.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_jobs_run_to_their_end_and_pass_their_exit_code_on(head, tmp_path):
    done = submit(head, "recipe=quickstart", "help=true")
    assert done.returncode == 0 and "algo.prompts_per_step" in done.stdout, done.stdout + done.stderr
    wrong = submit(head, "recipe=quikstart")
    assert wrong.returncode == 2 and "did you mean quickstart" in wrong.stdout
    small = ["steps=2", "warm_start.steps=150", "eval.prompts=16", "algo.groups=keep", "learner.threads=1"]
    run = submit(head, "recipe=quickstart", *small, f"output_dir={tmp_path}", "monitor.wandb=disabled")
    assert run.returncode == 0, run.stdout[-3000:]
    assert (tmp_path / "quickstart" / "latest" / "summary.json").is_file()
