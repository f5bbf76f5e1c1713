"""Signals that ask a run to end: when they are heeded, what a second one does, that Ray's handler does not win, and that a real
run saves, leaves and goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import finish, metrics, start, weights

from rlpipe import interruption, run
from rlpipe.errors import Interrupted, RlpipeError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def clean():
    interruption.uninstall()  # other tests may have asked, as a driver does
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    yield
    interruption.uninstall()
    assert {number: signal.getsignal(number) for number in interruption.SIGNALS} == before


def ask(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the interpreter runs handlers between two instructions


def test_before_the_first_check_a_signal_ends_the_run_on_the_spot():
    interruption.install()
    assert interruption.requested() == ""
    with pytest.raises(Interrupted, match="SIGTERM"):
        ask(signal.SIGTERM)
    assert interruption.requested() == "SIGTERM"
    ask(signal.SIGTERM)  # while the first is dealt with, its echo is not heeded
    interruption.uninstall()
    interruption.install()
    with pytest.raises(KeyboardInterrupt):
        ask(signal.SIGINT)


@pytest.mark.parametrize("number", interruption.SIGNALS, ids=lambda number: number.name)
def test_after_it_a_signal_waits_for_the_next(number, capfd):
    interruption.check()
    ask(number)
    ask(signal.SIGTERM)  # an echo
    assert interruption.requested() == number.name
    assert f"{number.name}: the run saves" in capfd.readouterr().err
    with pytest.raises(Interrupted, match=number.name):
        interruption.check()


def test_check_takes_the_signal_back_from_whoever_took_it():
    interruption.check()
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("this is Ray's"))
    interruption.check()
    ask(signal.SIGTERM)
    assert interruption.requested() == "SIGTERM"


def test_a_second_ctrl_c_is_one(monkeypatch):
    monkeypatch.setattr(interruption, "ECHO_S", 0.0)
    interruption.check()
    ask(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ask(signal.SIGINT)


@pytest.mark.parametrize(
    "error, number, code", [(Interrupted, "SIGTERM", 75), (Interrupted, "SIGINT", 130), (RlpipeError, "", 1)]
)
def test_the_exit_code_says_how_a_run_ended(error, number, code, capsys):
    def command(_):
        interruption.check()
        if number:
            ask(getattr(signal, number))
        interruption.check()
        raise error("no room")

    assert run.main([], command) == code
    said = capsys.readouterr().err
    assert ("resume=auto continues" in said) == (code != 1)


SLEEPER = """
import os, sys, time
from rlpipe import interruption, run
interruption.ECHO_S = 0.2

def command(_):
    {first}
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.05)
        {often}
sys.exit(run.main([], command))
"""


def sleeper(first: str = "interruption.check()", often: str = "pass") -> subprocess.Popen:
    code = SLEEPER.format(first=first, often=often)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_signal_ends_a_run_that_does_not_heed_the_first():
    process = sleeper()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # its echo
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM
    process.communicate()


def test_a_run_that_checks_leaves_with_its_code():
    process = sleeper(often="interruption.check()")
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=20)
    assert process.returncode == interruption.EXIT_CODE == os.EX_TEMPFAIL
    assert "SIGUSR1 asked the run to end; the same command with resume=auto" in said and "Traceback" not in said


def leave(process: subprocess.Popen, folder: Path, number: int) -> str:
    """Ask a run to end; returns what it said. It must have saved and left with its code."""
    process.send_signal(number)
    code = process.wait(timeout=200)
    said = (folder / "console.txt").read_text()
    assert code == (130 if number == signal.SIGINT else interruption.EXIT_CODE), said[-3000:]
    assert f"{signal.Signals(number).name} asked the run to end; the same command with resume=auto" in said
    assert "Traceback" not in said, said[-3000:]
    return said


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (run_dir / "checkpoints").glob("step_*") if path.name[-6:].isdecimal())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_saves_its_last_step_leaves_and_goes_on(tmp_path):
    """SIGTERM, then Ctrl-C, at steps of which no checkpoint is due; the end is that of a run that nobody asked anything."""
    whole = finish(start(tmp_path / "whole", "checkpoint.every=0", "eval.every=0"), tmp_path / "whole")
    folder, settings = tmp_path / "asked", ["checkpoint.every=0", "eval.every=0", "run_id=mine", "resume=auto"]
    run_dir = folder / "quickstart" / "mine"
    for step, number in ((1, signal.SIGTERM), (3, signal.SIGINT)):
        process = start(folder, *settings)
        wait_for_metrics(run_dir, process, step)
        leave(process, folder, number)
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert saved_steps(run_dir)[-1] == last >= step
    ended = finish(start(folder, *settings), folder)
    assert ended == run_dir and metrics(ended) == metrics(whole) and weights(ended) == weights(whole)


def wait_for_metrics(run_dir: Path, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(
            json.loads(line)["step"] >= step for line in path.read_text().splitlines() if line[-1:] == "}"
        ):
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} never came:\n" + (run_dir.parent.parent / "console.txt").read_text()[-3000:])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_supervised_training_does_too(tmp_path):
    small = [
        "recipe=quickstart", "steps=40", "eval.every=0", "checkpoint.every=0", "model.layers=2", "model.width=32",
        "model.heads=2", "model.mlp=64", "sft.batch_size=8", "sft.held_out=0", "monitor.wandb=disabled",
        "cluster.address=local", "learner.threads=1", f"output_dir={tmp_path}", "run_id=mine", "resume=auto",
    ]  # fmt: skip
    run_dir = tmp_path / "quickstart" / "mine"

    def sft(*more: str) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
        console = (tmp_path / "console.txt").open("a")
        command = [sys.executable, "-m", "rlpipe.sft", *small, *more]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT)

    process = sft()
    wait_for_metrics(run_dir, process, 2)
    leave(process, tmp_path, signal.SIGUSR1)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert saved_steps(run_dir) == [last] and last < 40
    assert sft(f"steps={last + 2}").wait(timeout=300) == 0, (tmp_path / "console.txt").read_text()[-3000:]
    assert saved_steps(run_dir)[-1] == last + 2
