"""Weights & Biases: offline runs for real, everything else with a stand-in."""

import json
import sys
import types
from pathlib import Path

import pytest
from test_monitor import config, open_monitor, sample

from rlpipe.monitor.tracker import TABLE_ROWS, Tracker


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No login, no settings of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))


def runs(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "wandb").iterdir() if path.name.startswith("offline-run-"))


def history(folder: Path) -> tuple[list[dict], dict]:
    """(lines logged, config) of an offline run. Its file is a LevelDB log: 32 KiB blocks, 7-byte record heads."""
    from wandb.proto import wandb_internal_pb2

    data = next(folder.glob("*.wandb")).read_bytes()
    at, whole, lines, settings = 7, b"", [], {}
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:
            break
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "run":
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines, settings


def test_an_offline_run_has_the_same_numbers_and_resumes_under_its_id(tmp_path):
    monitor = open_monitor(tmp_path, wandb="auto", project="p")
    for step in range(3):
        monitor.log(step, {"reward/mean": step / 3, "eval/accuracy": 0.5})
        monitor.samples(step, [sample(step)])
    state = monitor.state()
    monitor.finish({"steps": 2}, status="failed")
    assert monitor.warnings == 0, monitor.console.stream.getvalue()
    (first,) = runs(monitor.run_dir)
    assert (first / f"run-{state['wandb_id']}.wandb").exists()
    assert f"wandb sync {first}" in monitor.console.stream.getvalue()
    lines, settings = history(first)
    numbers = [line for line in lines if "reward/mean" in line]
    assert [(line["step"], line["reward/mean"], line["eval/accuracy"]) for line in numbers] == [
        (step, step / 3, 0.5) for step in range(3)
    ]
    assert settings["algo"]["preset"] == "tracerl"
    tables = [json.loads(path.read_text()) for path in first.rglob("*.table.json")]
    assert max(len(table["data"]) for table in tables) == 3, "each table holds all rows so far"
    assert not (tmp_path / "home").exists(), "nothing is written outside the run folder"

    resumed = open_monitor(tmp_path, wandb="auto", resume={"step": 1, **state})
    assert resumed.state() == state
    resumed.log(2, {"reward/mean": 0.75})
    resumed.samples(2, [sample(9)])
    resumed.finish({"steps": 2}, status="finished")
    second = next(path for path in runs(resumed.run_dir) if path != first)
    assert (second / f"run-{state['wandb_id']}.wandb").exists()
    assert [line["step"] for line in history(second)[0] if "reward/mean" in line] == [2]
    (table,) = [json.loads(path.read_text()) for path in second.rglob("*.table.json")]
    assert [row[:2] for row in table["data"]] == [[0, "toy/0#0"], [1, "toy/1#0"], [2, "toy/9#0"]]


def test_disabled_never_imports_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    monitor = open_monitor(tmp_path, wandb="disabled", resume={"step": 0, "wandb_id": "abc"})
    monitor.log(1, {"reward/mean": 0.5})
    monitor.samples(1, [sample()])
    monitor.finish({}, status="finished")
    assert monitor.warnings == 0 and monitor.state() == {"wandb_id": "abc"}


def test_a_missing_package_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monitor = open_monitor(tmp_path, wandb="auto", resume={"step": 0, "wandb_id": "abc"})
    monitor.log(1, {"reward/mean": 0.5})
    monitor.finish({}, status="finished")
    assert monitor.warnings == 1 and monitor.state() == {"wandb_id": "abc"}, "a later resume continues the W&B run"
    assert "W&B failed while starting" in monitor.console.stream.getvalue()


class FakeRun:
    def __init__(self, folder: str):
        self.id, self.dir, self.url = "id1", f"{folder}/wandb/run-1/files", "https://wandb.example/runs/id1"
        self.summary, self.logged, self.code, self.broken = {}, [], None, False

    def define_metric(self, name, step_metric=None, hidden=False):
        assert name == "step" or step_metric == "step"

    def log(self, line):
        if self.broken:
            raise ConnectionResetError("the service went away")
        self.logged.append(line)

    def finish(self, exit_code):
        self.code = exit_code


def fake_wandb(*, login: bool = False, refuse: tuple[str, ...] = ()) -> types.ModuleType:
    """A stand-in that records how it was opened, in `opened`."""
    wandb = types.ModuleType("wandb")
    wandb.opened, wandb.runs = [], []
    wandb.Settings = lambda **settings: settings
    wandb.Table = lambda columns, data: {"columns": columns, "data": data}
    wandb.Histogram = lambda np_histogram: np_histogram
    wandb.setup = lambda settings: None
    wandb.teardown = lambda: None
    wandb.login = lambda prompt, verify: login

    def init(**arguments):
        wandb.opened.append(arguments)
        if arguments["mode"] in refuse:
            raise TimeoutError("no answer")
        wandb.runs.append(FakeRun(arguments["dir"]))
        return wandb.runs[-1]

    wandb.init = init
    return wandb


def told(warn) -> dict:
    return {"note": lambda text: None, "warn": warn}


@pytest.mark.parametrize(
    "wanted, variable, login, refuse, tried",
    [
        ("auto", "", False, (), ["offline"]),
        ("auto", "", True, (), ["online"]),
        ("auto", "", True, ("online",), ["online", "offline"]),
        ("auto", "online", False, ("online",), ["online"]),
        ("auto", "disabled", True, (), []),
        ("online", "offline", False, (), ["online"]),
        ("offline", "", True, ("offline",), ["offline"]),
    ],
)
def test_the_modes_tried(tmp_path, monkeypatch, wanted, variable, login, refuse, tried):
    wandb = fake_wandb(login=login, refuse=refuse)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_MODE", variable)
    warnings = []
    tracker = Tracker(config(tmp_path, wandb=wanted), tmp_path, wandb_id=None, **told(warnings.append))
    assert [call["mode"] for call in wandb.opened] == tried
    assert len(warnings) == len(set(tried) & set(refuse))
    assert tracker.active == bool(set(tried) - set(refuse))
    tracker.finish({}, succeeded=True)


def test_a_malformed_key_leaves_an_offline_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monitor = open_monitor(tmp_path, wandb="auto")
    monitor.finish({}, status="finished")
    assert monitor.warnings == 1 and "login cannot be used" in monitor.console.stream.getvalue()
    assert len(runs(monitor.run_dir)) == 1


def test_how_a_run_is_opened(tmp_path, monkeypatch):
    wandb = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = Tracker(config(tmp_path), tmp_path, wandb_id="old", **told(pytest.fail))
    assert wandb.opened == [], "disabled in this configuration"
    tracker = Tracker(config(tmp_path, wandb="online"), tmp_path / "r1", wandb_id="old", **told(pytest.fail))
    (call,) = wandb.opened
    assert (call["id"], call["resume"], call["dir"]) == ("old", "allow", str(tmp_path / "r1"))
    assert call["config"]["monitor"]["wandb"] == "online" and call["settings"]["init_timeout"] > 0
    assert tracker.where == "https://wandb.example/runs/id1"
    tracker.finish({"steps": 2, "seconds": float("nan")}, succeeded=False)
    (run,) = wandb.runs
    assert run.code == 1 and run.summary == {"steps": 2, "seconds": None}
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "mine"))
    Tracker(config(tmp_path, wandb="online"), tmp_path / "r1", wandb_id=None, **told(pytest.fail)).finish({}, succeeded=True)
    assert wandb.opened[-1]["dir"] == str(tmp_path / "mine")


def test_a_service_that_dies_costs_its_curves_and_is_said_once(tmp_path, monkeypatch):
    wandb = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monitor = open_monitor(tmp_path, wandb="offline")
    monitor.log(0, {"reward/mean": 0.0})
    wandb.runs[0].broken = True
    for step in (1, 2):
        monitor.log(step, {"reward/mean": 1.0})
        monitor.samples(step, [sample()])
    monitor.finish({"steps": 2}, status="finished")
    assert monitor.warnings == 1 and "the service went away" in (monitor.run_dir / "log.txt").read_text()
    assert len((monitor.run_dir / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_table_holds_the_newest_rows(tmp_path, monkeypatch):
    wandb = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = Tracker(config(tmp_path, wandb="offline"), tmp_path, wandb_id=None, **told(pytest.fail))
    for step in range(TABLE_ROWS + 3):
        tracker.samples(step, [sample(step)])
    table = wandb.runs[0].logged[-1]["samples"]
    assert len(table["data"]) == TABLE_ROWS and table["data"][0][0] == 3
    assert table["data"][-1][table["columns"].index("parts")] == '{"format": 1.0}'
    tracker.finish({}, succeeded=True)


def test_lags_are_a_histogram_with_a_bin_each(tmp_path, monkeypatch):
    wandb = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = Tracker(config(tmp_path, wandb="offline"), tmp_path, wandb_id=None, **told(pytest.fail))
    tracker.log(3, {"reward/mean": 0.5}, [0, 2, 2])
    tracker.log(4, {"reward/mean": 0.5})
    tracker.log(5, {}, [-2])
    assert wandb.runs[0].logged == [
        {"step": 3, "reward/mean": 0.5, "rollout/lag": ([1, 0, 2], [-0.5, 0.5, 1.5, 2.5])},
        {"step": 4, "reward/mean": 0.5},
        {"step": 5, "rollout/lag": ([1], [-0.5, 0.5])},
    ]
    tracker.finish({}, succeeded=True)


def test_steps_done_again_are_logged_again_in_the_same_run(tmp_path):
    monitor = open_monitor(tmp_path, wandb="offline")
    monitor.watch()
    for step in (1, 2, 3):
        monitor.log(step, {"reward/mean": step / 10}, lags=[0, 1])
        monitor.samples(step, [sample(step)])
    monitor.rewind(1)
    for step in (2, 3):
        monitor.log(step, {"reward/mean": step / 5}, lags=[1])
    monitor.samples(2, [sample(7)])
    monitor.finish({"steps": 3}, status="finished")
    (folder,) = runs(monitor.run_dir)
    lines = [line for line in history(folder)[0] if "reward/mean" in line]
    shown = [(line["step"], line["reward/mean"], line["cluster/rollbacks"]) for line in lines]
    assert shown == [(1, 0.1, 0.0), (2, 0.2, 0.0), (3, 0.3, 0.0), (2, 0.4, 1.0), (3, 0.6, 1.0)]
    histogram = {key: lines[-1][f"rollout/lag/{key}"] for key in ("_type", "values", "bins")}
    assert histogram == {"_type": "histogram", "values": [0, 1], "bins": [-0.5, 0.5, 1.5]}
    tables = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    assert [[row[1] for row in table["data"]] for table in tables if table["data"][-1][1] == "toy/7#0"] == [
        ["toy/1#0", "toy/7#0"]
    ]
