"""What a run leaves in its folder, and what is left of it after an interruption."""

import errno
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlpipe.config import MonitorConfig, RunConfig
from rlpipe.errors import CheckpointError
from rlpipe.monitor import files, latest
from rlpipe.monitor.latest import latest_run, point_latest
from rlpipe.monitor.metrics import MetricsLog, read_metrics
from rlpipe.monitor.monitor import Monitor, SampleRow
from rlpipe.monitor.samples import SampleStore, extremes


def config(folder: Path, **monitor) -> RunConfig:
    return RunConfig(name="toy", output_dir=str(folder), monitor=MonitorConfig(**{"wandb": "disabled"} | monitor))


def open_monitor(folder: Path, run: str = "a", resume=None, **monitor) -> Monitor:
    cfg = config(folder, **monitor)
    return Monitor(folder / "toy" / run, cfg, config_yaml="name: toy\n", resume=resume, stream=io.StringIO())


def sample(index: int = 0, reward: float = 1.0, **changes) -> SampleRow:
    values = {
        "uid": f"toy/{index}#0",
        "prompt": "1+1=",
        "response": "2!",
        "reward": reward,
        "advantage": reward - 0.5,
        "tokens": 2,
        "steps": 2,
        "step_map": [2, 1, 0],
        "token_texts": ["2", "!", "_"],
        "parts": {"format": 1.0},
    }
    return SampleRow(**values | changes)


def steps_of(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_leaves_its_files(tmp_path):
    monitor = open_monitor(tmp_path)
    run_dir = monitor.run_dir
    monitor.log(0, {"eval/accuracy": 0.25})
    monitor.log(1, {"reward/mean": np.float32(0.5), "perf/step_s": 2, "eval/accuracy": 0.75})
    monitor.samples(1, [sample()])
    monitor.note("hello")
    monitor.finish({"steps": 1, "eval_start": 0.25, "eval_final": np.float64(0.75), "seconds": 3.0}, status="finished")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "eval/accuracy": 0.75, "perf/step_s": 2.0, "reward/mean": 0.5},
    ]
    assert (run_dir / "config.yaml").read_text() == "name: toy\n"
    stored = json.loads((run_dir / "trajectories" / "step_000001.json").read_text())
    assert stored["step"] == 1 and stored["rows"][0]["step_map"] == [2, 1, 0]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval_final"] == 0.75 and summary["status"] == "finished" and summary["warnings"] == 0
    assert summary["machine"]["cpu_count"] == os.cpu_count() and "python" in summary["versions"]
    assert (run_dir / "report.html").stat().st_size > 5000
    assert "hello" in (run_dir / "log.txt").read_text()
    assert not list(run_dir.rglob("*.partial")), "no temporary file stays"
    console = monitor.console.stream.getvalue()
    assert "0.250 before, 0.750 after (+0.500)" in console
    assert str(run_dir / "report.html") in console and str(run_dir / "metrics.jsonl") in console


def test_a_failed_run_says_so_and_how_to_continue(tmp_path):
    monitor = open_monitor(tmp_path)
    monitor.finish({}, status="failed")
    assert json.loads((monitor.run_dir / "summary.json").read_text())["status"] == "failed"
    assert "No step was logged" in (monitor.run_dir / "report.html").read_text()
    console = monitor.console.stream.getvalue()
    assert "failed before the first step" in console and "resume=auto" in console


@pytest.mark.parametrize("key", ["loss", "health/nan", "eval/", "/mean"])
def test_a_key_outside_the_sections_is_refused(tmp_path, key):
    monitor = open_monitor(tmp_path)
    with pytest.raises(ValueError, match="section"):
        monitor.log(1, {key: 1.0})
    assert steps_of(monitor.run_dir) == []


def test_steps_come_once_and_in_order(tmp_path):
    monitor = open_monitor(tmp_path)
    monitor.log(3, {"reward/mean": 1.0})
    for step in (3, 2):
        with pytest.raises(ValueError, match="in order"):
            monitor.log(step, {"reward/mean": 1.0})


def test_non_finite_numbers_become_null_and_are_warned_of(tmp_path):
    monitor = open_monitor(tmp_path)
    monitor.log(1, {"algo/loss": float("nan"), "algo/grad_norm": float("inf"), "reward/mean": 0.5})
    assert read_metrics(monitor.run_dir / "metrics.jsonl") == [
        {"step": 1, "algo/grad_norm": None, "algo/loss": None, "reward/mean": 0.5}
    ]
    assert monitor.warnings == 2
    assert "algo/loss is nan" in (monitor.run_dir / "log.txt").read_text()
    monitor.finish({"steps": 1, "tokens_per_s": float("nan")}, status="finished")
    assert json.loads((monitor.run_dir / "summary.json").read_text())["tokens_per_s"] is None


def test_the_same_numbers_give_the_same_bytes(tmp_path):
    metrics = {"reward/mean": 0.1, "algo/loss": 1 / 3, "algo/kl": 1e-17}
    for run, order in (("a", list(metrics)), ("b", list(reversed(metrics)))):
        open_monitor(tmp_path, run).log(1, {key: metrics[key] for key in order})
    first, second = ((tmp_path / "toy" / run / "metrics.jsonl").read_bytes() for run in "ab")
    assert first == second


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    monitor = open_monitor(tmp_path)
    for step in range(6):
        monitor.log(step, {"reward/mean": step / 3})
        monitor.samples(step, [sample(step)])
    monitor.finish({"steps": 5}, status="failed")
    before = (monitor.run_dir / "metrics.jsonl").read_bytes()
    with (monitor.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "reward/me')

    resumed = open_monitor(tmp_path, resume={"step": 3, "wandb_id": None})
    assert (resumed.run_dir / "metrics.jsonl").read_bytes() == b"".join(before.splitlines(keepends=True)[:4])
    assert resumed.store.steps() == [0, 1, 2, 3]
    assert not (resumed.run_dir / "summary.json").exists(), "it told of the interrupted run"
    for step in (4, 5):
        resumed.log(step, {"reward/mean": step / 3})
    assert (resumed.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_resume_without_the_step_of_the_checkpoint_logs_on(tmp_path):
    monitor = open_monitor(tmp_path)
    monitor.log(0, {"reward/mean": 0.0})
    resumed = open_monitor(tmp_path, resume={"step": 0})
    resumed.log(1, {"reward/mean": 1.0})
    assert steps_of(resumed.run_dir) == [0, 1]


def test_a_folder_of_another_run_is_refused(tmp_path):
    open_monitor(tmp_path).log(0, {"reward/mean": 0.0})
    with pytest.raises(CheckpointError, match="another run"):
        open_monitor(tmp_path)
    assert steps_of(tmp_path / "toy" / "a") == [0]


def test_a_damaged_line_is_an_error_unless_it_is_the_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\x00\x00\n')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        MetricsLog(path, 3)
    assert '{"st' in path.read_text(), "nothing is rewritten before it was understood"


def test_latest_follows_the_newest_run(tmp_path):
    open_monitor(tmp_path, "a")
    home = tmp_path / "toy"
    assert os.readlink(home / "latest") == "a"
    open_monitor(tmp_path, "b")
    assert (home / "latest").resolve() == (home / "b").resolve() == latest_run(home)
    assert sorted(p.name for p in home.iterdir()) == ["a", "b", "latest"]


def test_latest_is_a_text_file_where_links_do_not_exist(tmp_path, monkeypatch):
    home = tmp_path / "toy"

    def refuse(self, target, target_is_directory=False):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for run in ("a", "b"):
        (home / run).mkdir(parents=True)
        point_latest(home, home / run)
        assert latest_run(home) == (home / run).resolve()
    assert (home / "latest").read_text() == "b\n"


def test_latest_never_replaces_a_folder(tmp_path):
    (tmp_path / "latest").mkdir()
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="rename it"):
        point_latest(tmp_path, tmp_path / "a")
    assert latest.latest_run(tmp_path / "nothing") is None


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_json(path, {"old": 1})
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"summary\.json cannot be written: No space left.*Free some space"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_stops_the_step_and_the_summary(tmp_path, monkeypatch):
    monitor = open_monitor(tmp_path)
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        monitor.log(1, {"reward/mean": 1.0})
    with pytest.raises(CheckpointError, match=r"step_000001\.json"):
        monitor.samples(1, [sample()])
    with pytest.raises(CheckpointError, match=r"summary\.json"):
        monitor.finish({"steps": 1}, status="finished")


def test_after_a_failure_an_unwritable_summary_does_not_hide_its_cause(tmp_path, monkeypatch):
    monitor = open_monitor(tmp_path)
    monkeypatch.setattr(files.os, "fsync", full_disk)
    monitor.finish({}, status="failed")
    assert "summary.json cannot be written" in monitor.console.stream.getvalue()


def test_samples_keep_the_best_and_the_worst(tmp_path):
    rows = [sample(i, reward=r) for i, r in enumerate([0.5, 0.1, 0.9, 0.3, 0.7])]
    assert [row.reward for row in extremes(rows, 3)] == [0.9, 0.7, 0.1]
    assert [row.reward for row in extremes(rows, 9)] == [0.9, 0.7, 0.5, 0.3, 0.1]
    assert extremes(rows, 0) == []
    monitor = open_monitor(tmp_path, samples=2)
    monitor.samples(4, rows)
    assert [row.reward for row in monitor.store.read(4)] == [0.9, 0.1]


def test_samples_survive_any_text_and_number(tmp_path):
    store = SampleStore(tmp_path)
    odd = sample(response="\ud800\x00</script>", reward=float("nan"), parts={"note": np.float32(0.5), "ids": np.arange(2)})
    store.write(7, [odd])
    again = store.read(7)[0]
    assert again.response == odd.response and again.reward is None and again.parts == {"note": 0.5, "ids": [0, 1]}
    with pytest.raises(ValueError, match="3 commit steps for 2 tokens"):
        sample(token_texts=["a", "b"])


def test_the_newest_samples_in_order(tmp_path):
    store = SampleStore(tmp_path)
    for step in range(4):
        store.write(step, [sample(10 * step + i) for i in range(3)])
    assert [(step, row.uid) for step, row in store.last_rows(4)] == [
        (2, "toy/22#0"), (3, "toy/30#0"), (3, "toy/31#0"), (3, "toy/32#0")
    ]  # fmt: skip
    (tmp_path / "step_000003.json").write_text("{")
    with pytest.raises(CheckpointError, match="step_000003"):
        store.read(3)


def test_log_txt_also_has_what_the_package_logs(tmp_path):
    monitor = open_monitor(tmp_path)
    logging.getLogger("rlpipe").warning("waiting for %s", "placement")
    monitor.warn("two\nlines \x1b[31m")
    text = (monitor.run_dir / "log.txt").read_text()
    assert "waiting for placement" in text
    assert "warning: two\n" + " " * 20 + "lines \\x1b[31m\n" in text
    monitor.finish({}, status="failed")
    logging.getLogger("rlpipe").warning("after the end")
    assert "after the end" not in (monitor.run_dir / "log.txt").read_text()


def test_the_monitor_alone_loads_nothing_heavy():
    heavy = {"torch", "ray", "deepspeed", "wandb", "rich", "transformers", "omegaconf"}
    code = f"import sys, rlpipe.monitor.monitor; sys.exit(','.join({heavy!r} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
