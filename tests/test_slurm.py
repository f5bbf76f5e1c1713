"""launch/slurm.sbatch with stubs in place of Slurm, Ray and Python: what it starts where, what it passes on, what it leaves.
And once with the real Ray (`-m slow`)."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "launch" / "slurm.sbatch"

SRUN = """#!/usr/bin/env bash
echo "srun $*" | head -1 >> {log}
while [[ "$1" == --* ]]; do shift; done
export SLURM_CPUS_ON_NODE={cpus} SLURM_GPUS_ON_NODE={gpus}
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then tr , '\\n' <<< "$3"; else echo "scontrol $*" >> {log}; fi
exit ${{REQUEUE_FAILS:-0}}
"""
RAY = """#!/usr/bin/env bash
mkdir -p "$RLPIPE_RAY_TEMPORARY"
trap 'echo "ray ended" >> {log}; exit 0' TERM
echo "ray $*" >> {log}
if [ -n "${{RAY_DIES:-}}" ]; then exit 1; fi
while :; do sleep 0.05; done
"""
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exec {python} "$@"; fi
echo "python $*" >> {log}
echo "token ${{#RAY_AUTH_TOKEN}} $RAY_AUTH_MODE $RAY_ADDRESS" >> {log}
if [ "$1" = - ]; then
    cat > {log}.joined
    until [ "$(grep -c "^ray start" {log})" -ge "$2" ]; do sleep 0.02; done
    exit ${{JOIN_CODE:-0}}
fi
trap 'echo "driver got USR1" >> {log}; sleep 0.3; exit 75' USR1
trap 'echo "driver got TERM" >> {log}; exit 75' TERM
[ -z "${{DRIVER_CODE:-}}" ] || exit "$DRIVER_CODE"
while :; do sleep 0.05; done
"""


class Site:
    """A Slurm of stubs with a checkout in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "calls.txt"
        (folder / "checkout" / "rlpipe").mkdir(parents=True)
        (folder / "checkout" / "rlpipe" / "run.py").touch()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("env/bin/ray", RAY), ("env/bin/python", PYTHON)):
            path = folder / "stubs" / name if "/" not in name else folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.format(python=sys.executable, log=self.log, cpus=64, gpus=8))
            path.chmod(0o755)
        self.job = f"{os.getpid()}{time.monotonic_ns() % 10**6}"

    def start(self, *arguments: str, nodes: str = "localhost,n2,n3", **variables: str) -> subprocess.Popen:
        self.log.write_text("")
        environment = {
            "PATH": f"{self.folder / 'stubs'}:/usr/bin:/bin", "HOME": str(self.folder), "RLPIPE_ENV": str(self.folder / "env"),
            "SLURM_JOB_ID": self.job, "SLURM_JOB_NODELIST": nodes, "SLURM_SUBMIT_DIR": str(self.folder / "checkout"),
            "SLURM_CPUS_PER_TASK": "64",
        }  # fmt: skip
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.Popen(
            command, env=environment | variables, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        """(exit code, what it printed, the calls of the stubs)."""
        process = self.start(*arguments, **variables)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said, self.calls()

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + 30
        while not any(word in call for call in self.calls()):
            assert time.monotonic() < deadline, f"no {word} in {self.calls()}"
            time.sleep(0.02)


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def test_a_step_a_node_then_the_driver(site):
    code, said, calls = site.run("recipe=tracerl_math", "seed=1", DRIVER_CODE="0")
    assert code == 0, said
    steps = sorted(call for call in calls if call.startswith("srun"))
    assert [f"--nodelist={node} " in step for node, step in zip(("localhost", "n2", "n3"), steps, strict=True)] == [True] * 3
    for step in steps:
        assert "--nodes=1 --ntasks=1" in step and "--overlap --no-kill --mem=0 --cpus-per-task=64 bash -c" in step
    starts = [call for call in calls if call.startswith("ray start")]
    (head,) = [start for start in starts if "--head" in start]
    assert len(starts) == 3 and all("--block --num-cpus=64 --num-gpus=8" in start for start in starts)
    words = dict(word.split("=", 1) for word in shlex.split(head) if "=" in word)
    address = f"{words['--node-ip-address']}:{words['--port']}"
    assert not address.startswith("127.") and words["--temp-dir"] == f"/tmp/rlpipe-{site.job}"
    assert (
        sorted(start for start in starts if start != head)
        == [f"ray start --block --num-cpus=64 --num-gpus=8 --address={address}"] * 2
    )
    pinned = f"run_id=slurm-{site.job} resume=auto recipe=tracerl_math seed=1"
    assert f"python -m rlpipe.supervise retries=5 -- python -m rlpipe.run {pinned}" in calls
    assert f"token 64 token {address}" in calls
    joined = calls.index("python - 3 3 300")
    assert joined < next(index for index, call in enumerate(calls) if "rlpipe.supervise" in call)
    assert calls.count("ray ended") == 3 and not Path(words["--temp-dir"]).exists()
    assert not any(call.startswith("scontrol") for call in calls)


def test_a_warning_reaches_the_driver_and_the_job_is_requeued(site):
    process = site.start("recipe=quickstart")
    site.wait_for("rlpipe.supervise")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    calls = site.calls()
    assert process.returncode == 75, said
    assert calls.count("driver got USR1") == 1 and calls[-1] == f"scontrol requeue {site.job}"
    assert calls.index("driver got USR1") < calls.index("ray ended"), "Ray lives until the run has saved"
    assert "the run left with exit code 75" in said


def test_a_cancelled_job_is_not_requeued(site):
    process = site.start("recipe=quickstart")
    site.wait_for("rlpipe.supervise")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and "driver got TERM" in site.calls()
    assert not any(call.startswith("scontrol") for call in site.calls())


def test_a_job_that_is_preempted_without_warning_tries_to_save(site):
    process = site.start("recipe=quickstart")
    site.wait_for("rlpipe.supervise")
    steps = [child for child in psutil.Process(process.pid).children() if "--head" in child.cmdline()]
    steps[0].send_signal(signal.SIGTERM)  # Slurm signals steps, not the script
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "driver got TERM" in site.calls(), said
    assert not any(call.startswith("scontrol") for call in site.calls()), "Slurm requeues it, or it was cancelled"


def test_requeueing_can_be_off_or_refused(site):
    for variables, told in (({"RLPIPE_REQUEUE": "0"}, False), ({"REQUEUE_FAILS": "1"}, True)):
        process = site.start("recipe=quickstart", **variables)
        site.wait_for("rlpipe.supervise")
        process.send_signal(signal.SIGUSR1)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 75
        assert (f"run_id=slurm-{site.job} resume=auto" in said) == told
        assert any(call.startswith("scontrol requeue") for call in site.calls()) == told


def test_nodes_that_do_not_join_end_the_job_and_leave_nothing(site):
    code, said, calls = site.run("recipe=quickstart", JOIN_CODE="1", RLPIPE_MIN_NODES="2", RLPIPE_NODES_S="20")
    assert code == 1 and "python - 3 2 20" in calls
    assert not any("rlpipe.supervise" in call for call in calls) and calls.count("ray ended") == 3
    compile((site.folder / "calls.txt.joined").read_text(), "the wait for nodes", "exec")


def test_exit_codes_and_settings_are_passed_on(site):
    code, said, calls = site.run(
        "recipe=x", DRIVER_CODE="2", RLPIPE_RETRIES="1", RLPIPE_ENTRYPOINT="python mine.py", nodes="localhost"
    )
    assert code == 2 and "1 nodes: localhost" in said
    assert any(call.startswith("python -m rlpipe.supervise retries=1 -- python mine.py run_id=") for call in calls)
    assert "RLPIPE_HEAD_IP" in SCRIPT.read_text()
    _, _, calls = site.run("recipe=x", DRIVER_CODE="0", RLPIPE_HEAD_IP="10.1.2.3", nodes="localhost")
    assert any("--node-ip-address=10.1.2.3 " in call for call in calls)


def test_what_is_missing_is_said_before_anything_starts(site):
    process = subprocess.run(["bash", str(SCRIPT)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert process.returncode == 1 and "sbatch --nodes=2 launch/slurm.sbatch" in process.stderr
    code, said, calls = site.run(SLURM_SUBMIT_DIR=str(site.folder))
    assert code == 1 and "is not the checkout" in said and calls == []
    code, said, calls = site.run(RLPIPE_ENV="/nowhere")
    assert code == 1 and "RLPIPE_ENV" in said and calls == []


def test_its_directives_are_what_the_text_promises():
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert directives["signal"] == "B:USR1@180" and {"requeue", "no-kill"} <= directives.keys()
    assert directives["ntasks-per-node"] == "1" and directives["open-mode"] == "append"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_of_the_real_ray(tmp_path):
    """Slurm is a stub, Ray and the run are real: two nodes on this machine, a short quickstart, nothing left behind."""
    site = Site(tmp_path)
    (site.folder / "stubs" / "srun").write_text(SRUN.format(log=site.log, cpus=3, gpus=0))
    small = [
        "steps=2", "warm_start.steps=8", "eval.prompts=8", "eval.every=0", "algo.prompts_per_step=6", "learner.threads=1",
        "algo.samples_per_prompt=4", "model.layers=2", "model.width=32", "model.heads=2", "model.mlp=64", "rollout.cpus=2",
        f"verifier.name={ROOT / 'tests' / 'clue_verifier.py'}:share", "monitor.wandb=disabled",
        f"output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    process = site.start(
        "recipe=quickstart",
        *small,
        nodes=f"{socket.gethostname()},{socket.gethostname()}",
        RLPIPE_ENV=str(Path(sys.executable).parent.parent),
        SLURM_SUBMIT_DIR=str(ROOT),
        OMP_NUM_THREADS="1",
    )
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said[-4000:]
    assert "slurm: 2 nodes with 6 CPUs and 0 GPUs" in said and "the run left with exit code 0" in said
    assert (tmp_path / "out" / "quickstart" / f"slurm-{site.job}" / "summary.json").is_file()
    assert not Path(f"/tmp/rlpipe-{site.job}").exists()
    left = [p.pid for p in psutil.process_iter() if f"rlpipe-{site.job}" in " ".join(_command(p))]
    assert left == [], "processes of this job's Ray"


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
