"""The parent that keeps a run going: what it repeats, how often, with which run, and that nothing outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlpipe import supervise
from rlpipe.errors import ConfigError
from rlpipe.run_names import folders_of, free_folder
from rlpipe.supervise import Attempts, ended, is_death, last_step, metrics_of, pin, settings, state_of

ROOT = Path(__file__).resolve().parent.parent
RUN = ["python", "-m", "rlpipe.run", "recipe=quickstart"]


def a_run(home: Path, name: str, run_id: str | None = None, steps: int = 0, saved: bool = False) -> Path:
    folder = home / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"run_id: '{name if run_id is None else run_id}'\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(steps)))
    if saved:
        (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (home / "latest").unlink(missing_ok=True)
    (home / "latest").symlink_to(name)
    return folder


def test_an_attempt_that_gets_further_starts_the_count_anew():
    attempts = Attempts(retries=2, wait_s=1.0)
    assert attempts.refusal(None) == "" and attempts.refusal(None) == ""
    assert attempts.refusal(0) == "" and attempts.pause_s() == 1.0
    assert attempts.refusal(7) == "" and attempts.deaths == 1
    assert attempts.refusal(3) == "" and attempts.pause_s() == 2.0
    assert "3 times in a row without getting further" in attempts.refusal(4)


def test_three_deaths_after_the_same_step_are_no_accident():
    attempts = Attempts(retries=9, wait_s=0.0)
    assert attempts.refusal(5) == "" and attempts.refusal(5) == ""
    assert "3 times in a row after step 5" in attempts.refusal(5)
    attempts = Attempts(retries=9, wait_s=0.0)
    assert [attempts.refusal(step) for step in (5, 2, 2, 2, 2)] == [""] * 5, "killed while it started again from step 2"
    assert [attempts.refusal(step) for step in (5, 6, 6)] == [""] * 3


def test_pauses_double_up_to_a_minute():
    attempts = Attempts(retries=99, wait_s=2.0)
    pauses = []
    for _ in range(8):
        attempts.refusal(None)
        pauses.append(attempts.pause_s())
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize("code", [1, -9, -6, -11, 137, 134, 139])
def test_deaths(code):
    assert is_death(code)


@pytest.mark.parametrize("code", [0, 2, 75, 130, 143, -2, -15, 126, 127, 3])
def test_ends_that_are_meant(code):
    assert not is_death(code)


def test_how_it_ended_has_a_name():
    assert ended(-9) == ended(137) == "was killed by SIGKILL" and ended(-11) == "was killed by SIGSEGV"
    assert ended(1) == "ended with exit code 1" and ended(200) == "ended with exit code 200"


def test_a_new_run_is_pinned_to_a_free_name(tmp_path):
    words = [*RUN, f"output_dir={tmp_path}"]
    command, folder = pin(words)
    assert command == [*words, f"run_id={folder.name}", "resume=auto"] and folder.parent == tmp_path / "quickstart"
    assert not folder.exists()
    command, folder = pin([*words, "run_id=mine"])
    assert folder.name == "mine" and command[-2:] == ["run_id=mine", "resume=auto"]
    a_run(tmp_path / "quickstart", "mine", saved=True)
    assert pin([*words, "run_id=mine"])[1].name == "mine-2", "resume=never: a run of its own"
    assert pin([*words, "run_id=mine", "resume=auto"])[1].name == "mine"


def test_the_latest_run_is_pinned_as_it_is_now(tmp_path):
    words = [*RUN, f"output_dir={tmp_path}", "resume=auto"]
    home = tmp_path / "quickstart"
    a_run(home, "old", saved=True)
    assert pin(words) == ([*words, "run_id=old", "resume=auto"], home / "old")
    a_run(home, "old-2", "old", saved=True)
    assert pin(words)[1].name == "old", "began anew, under the same id"
    named_by_time = a_run(home, "20260101-120000", "", saved=True)
    command, folder = pin(words)
    assert folder == named_by_time and command[-2:] == ["run_id=20260101-120000", "resume=auto"]
    assert folders_of(home, folder.name) == [named_by_time], "which is what the attempts go on with"
    linked = [*words[:-1], f"resume={home / 'latest'}"]
    assert pin(linked) == ([*linked, f"resume={named_by_time}"], named_by_time), "another run may be the latest by then"
    a_run(home, "unsaved")
    assert pin(words)[1].name not in ("old", "unsaved"), "the latest has nothing to go on from and may be somebody's"
    assert pin([*words, f"checkpoint.path={tmp_path}"]) == ([*words, f"checkpoint.path={tmp_path}"], home)
    assert pin([*words[:-1], f"resume={home / 'old'}"]) == ([*words[:-1], f"resume={home / 'old'}"], home / "old")


@pytest.mark.parametrize(
    "command",
    [
        ["bash", "mine.sh", "recipe=quickstart"],
        ["python", "-m", "rlpipe.eval", "run=x"],
        ["python", "-m", "rlpipe.sft", "convert", "from=a", "to=b"],
        [*RUN, "help=true"],
        [*RUN, "dry_run=true"],
    ],
)
def test_other_commands_are_repeated_as_they_stand(command):
    assert pin(command) == (command, None)


def test_supervised_training_is_pinned_too(tmp_path):
    command, folder = pin(["python", "-m", "rlpipe.sft", "recipe=sft_smollm2_block", f"output_dir={tmp_path}"])
    assert folder.parent.name == "sft_smollm2_block" and command[-1] == "resume=auto"


def test_a_recipe_that_cannot_be_read_is_refused_once():
    with pytest.raises(ConfigError, match="did you mean"):
        pin(["python", "-m", "rlpipe.run", "recipe=quikstart"])


def test_folders_of_a_run(tmp_path):
    for name, run_id in (("a", "a"), ("a-2", "a"), ("a-10", "a"), ("a-3", "a-3"), ("a-b", "a"), ("ab", "a"), ("*", "*")):
        a_run(tmp_path, name, run_id)
    (tmp_path / "a-4").mkdir()
    assert [path.name for path in folders_of(tmp_path, "a")] == ["a", "a-2", "a-10"]
    assert [path.name for path in folders_of(tmp_path, "*")] == ["*"] and folders_of(tmp_path, "none") == []
    assert free_folder(tmp_path, "a").name == "a-5" and free_folder(tmp_path, "new").name == "new"


def test_the_last_step_is_that_of_this_attempt(tmp_path):
    folder = a_run(tmp_path, "a", steps=3)
    before = state_of(metrics_of(folder))
    assert last_step(folder, None) == 2 and last_step(folder, before) is None
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"step": 4')  # the last line was cut short by the death
    assert last_step(folder, before) == 3
    a_run(tmp_path, "a-2", "a", steps=6)
    assert last_step(folder, state_of(folder / "metrics.jsonl")) == 5, "it began anew"
    assert last_step(tmp_path, None) == 5, "the latest of a recipe"
    assert last_step(tmp_path / "none", None) is None and last_step(None, None) is None
    (tmp_path / "a-2" / "metrics.jsonl").write_text("broken\n{}\n")
    assert last_step(folder, None) is None


def test_run_folder_finds_the_run_of_a_name(tmp_path):
    from rlpipe import recipe, run

    home = tmp_path / "quickstart"
    cfg = recipe.load(["recipe=quickstart", f"output_dir={tmp_path}", "run_id=mine", "resume=auto"])
    assert run.run_folder(cfg) == (home / "mine", None)
    a_run(home, "mine")
    a_run(home, "mine-2", "", saved=True)
    a_run(home, "other", saved=True)
    assert run.run_folder(cfg) == (home / "mine-3", None), "the latest is not its own, and mine has nothing to go on from"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "after --"),
        (["retries=2", "--"], "after --"),
        (["retrys=2", "--", "true"], "retrys"),
        (["retries=many", "--", "true"], "whole number"),
        (["wait_s=-1", "--", "true"], "negative"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        settings(arguments)
    assert supervise.main(arguments) == 2


FAKE = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
arguments = dict(word.split("=", 1) for word in sys.argv[3:])
with open(here / "calls.txt", "a") as file:
    file.write(" ".join(sys.argv[3:]) + chr(10))
attempt = len((here / "calls.txt").read_text().splitlines())
folder = here / "quickstart" / arguments["run_id"]
folder.mkdir(parents=True, exist_ok=True)
steps, end = json.loads((here / "plan.json").read_text())[attempt - 1]
if steps:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + chr(10) for step in range(steps + 1)))
print("error: WorkerLost: a worker died" if end == 1 else "working", file=sys.stderr, flush=True)
if end == "wait":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    (here / "ready").write_text(str(os.getpid()))
    time.sleep(60)
os.kill(os.getpid(), -end) if end < 0 else sys.exit(end)
"""


def start(folder: Path, plan: list, *arguments: str) -> subprocess.Popen:
    """The supervisor over a fake of `python -m rlpipe.run`. plan: (last step, exit code or -signal or "wait") an attempt."""
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "fake.py").write_text(FAKE)
    fake = [sys.executable, str(folder / "fake.py"), "-m", "rlpipe.run", "recipe=quickstart", f"output_dir={folder}"]
    command = [sys.executable, "-m", "rlpipe.supervise", "wait_s=0.01", *arguments, "--", *fake]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, folder: Path) -> tuple[int, list[str], list[str]]:
    """(exit code, its lines, the arguments of every attempt)."""
    _, said = process.communicate(timeout=60)
    lines = [line for line in said.splitlines() if line.startswith("supervise: ")]
    return process.returncode, lines, (folder / "calls.txt").read_text().splitlines()


def test_a_run_that_dies_is_continued_to_its_end(tmp_path):
    code, lines, calls = finish(start(tmp_path, [(0, -9), (4, 1), (9, -6), (9, 0)]), tmp_path)
    assert code == 0 and len(calls) == 4 and len(set(calls)) == 1
    assert calls[0].split()[-1] == "resume=auto" and calls[0].split()[-2].startswith("run_id=2")
    assert "attempt 1 was killed by SIGKILL before its first step (working); again in 0.01 s" in lines[1]
    assert "attempt 2 ended with exit code 1 after step 4 (error: WorkerLost: a worker died)" in lines[2]
    assert "attempt 3 was killed by SIGABRT after step 9" in lines[3] and len(lines) == 4


def test_the_same_death_three_times_ends_with_its_cause(tmp_path):
    code, lines, calls = finish(start(tmp_path, [(4, 1)] * 9), tmp_path)
    assert code == 1 and len(calls) == 3
    assert "giving up: it died 3 times in a row after step 4" in lines[-1] and "WorkerLost" in lines[-1]


def test_retries_are_bounded(tmp_path):
    code, lines, calls = finish(start(tmp_path, [(0, -9)] * 9, "retries=1"), tmp_path)
    assert code == 137 and len(calls) == 2 and "retries=1" in lines[-1]


@pytest.mark.parametrize("code", [2, 75, 130])
def test_an_end_that_is_meant_is_passed_on(tmp_path, code):
    assert finish(start(tmp_path, [(3, code)] * 2), tmp_path)[::2] == (
        code,
        (tmp_path / "calls.txt").read_text().splitlines()[:1],
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def test_a_signal_reaches_the_run_and_its_code_comes_back(tmp_path):
    process = start(tmp_path, [(3, "wait")] * 2)
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path)[0] == 75
    assert len((tmp_path / "calls.txt").read_text().splitlines()) == 1


def test_a_signal_between_two_attempts_ends_it(tmp_path):
    process = start(tmp_path, [(3, 1)] * 2, "wait_s=50")
    wait_for(tmp_path / "calls.txt")
    for line in process.stderr:
        if "again in" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path)[::2] == (75, (tmp_path / "calls.txt").read_text().splitlines()[:1])


def test_the_run_does_not_outlive_a_supervisor_that_is_killed(tmp_path):
    process = start(tmp_path, [(3, "wait")])
    wait_for(tmp_path / "ready")
    child = psutil.Process(int((tmp_path / "ready").read_text()))
    process.kill()
    process.wait(timeout=20)
    child.wait(timeout=20)
    assert not child.is_running()


def test_it_loads_neither_ray_nor_torch():
    code = "import sys, rlpipe.supervise; print(*[n for n in ('ray', 'torch', 'numpy', 'deepspeed') if n in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == ""
    )
    helped = subprocess.run([sys.executable, "-m", "rlpipe.supervise", "help=true"], cwd=ROOT, capture_output=True, text=True)
    assert helped.returncode == 0 and "retries" in helped.stdout
    missing = [sys.executable, "-m", "rlpipe.supervise", "--", "/no/such/command"]
    gone = subprocess.run(missing, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    assert gone.returncode == 127 and "no such command" in gone.stderr
