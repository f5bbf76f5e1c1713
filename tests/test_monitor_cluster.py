"""What a run tells about its cluster: lag, idle shares, memory, incidents, and going back to an earlier step."""

import io
import json
import logging
import os
import threading
import time

import pytest
from test_monitor import open_monitor, sample, steps_of
from test_monitor_report import Page

from rlpipe import usage
from rlpipe.config import MonitorConfig, RunConfig
from rlpipe.errors import CheckpointError
from rlpipe.monitor import files, health, resources
from rlpipe.monitor.console import ASYNC_COLUMNS, COLUMNS, columns_of, header, row
from rlpipe.monitor.health import IdleMeter, cluster_summary, lag_metrics, memory_metrics
from rlpipe.monitor.incidents import Lost, fault_line, lost_work, read_incidents, totals
from rlpipe.monitor.monitor import Monitor
from rlpipe.monitor.resources import Sampler, cluster_state
from rlpipe.monitor.steplog import StepLog, read_lines


def test_lags_become_mean_most_and_shares():
    assert lag_metrics([]) == {}
    assert lag_metrics([0, 0]) == {"rollout/lag_mean": 0.0, "rollout/lag_max": 0.0, "rollout/lag_share_0": 1.0}
    assert lag_metrics([-3, 0]) == lag_metrics([0, 0]), "weights that a rollback took back"
    metrics = lag_metrics([0, 2, 2, 1, 30, 9])
    assert metrics["rollout/lag_mean"] == pytest.approx(44 / 6) and metrics["rollout/lag_max"] == 30.0
    shares = {key.removeprefix("rollout/lag_share_"): value for key, value in metrics.items() if "share" in key}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["2"] == pytest.approx(2 / 6) and shares["8_up"] == pytest.approx(2 / 6) and len(shares) == health.LAGS + 1


def test_idle_shares_by_role():
    now = [100.0]
    meter = IdleMeter(lambda: now[0])
    meter.add("rollout 0", "unit", 100.0, 104.0)
    meter.add("rollout 0", "part of it", 101.0, 102.0)
    meter.add("rollout 1", "unit", 100.0, 110.0)
    meter.add("rollout 1", "wait for weights", 100.0, 110.0)
    meter.add("learner", "update", 105.0, 110.0)
    meter.add("driver", "step", 100.0, 110.0)
    meter.add("checkpoint", "write", 100.0, 110.0)
    now[0] = 110.0
    assert meter.reading() == pytest.approx({"learner": 0.5, "rollout": 0.3})
    now[0] = 120.0
    assert meter.reading() == {"learner": 1.0, "rollout": 1.0}, "known workers that did nothing"
    assert set(meter.reading().values()) == {0.0}, "no time passed, so nobody was idle"


def test_units_longer_than_a_step_come_out_right_in_the_end():
    now = [0.0]
    meter = IdleMeter(lambda: now[0])
    shares = []
    for step in range(1, 31):
        now[0] = float(step)
        if step % 3 == 0:
            meter.add("rollout 0", "unit", step - 3.0, float(step))
        shares.append(meter.reading().get("rollout", 1.0))
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert shares[:3] == [1.0, 1.0, 0.0] and set(shares[3:]) == {0.0}, "told late, kept, and never above what passed"


def test_memory_by_role():
    replies = {
        "rollout": [{"peak_rss_mb": 5.0, "gpu_peak_mb": 70.0, "node_memory_share": 0.2}, {"peak_rss_mb": 7.0, "pid": 3}],
        "learner": [{"peak_rss_mb": 9.0, "node_memory_share": 0.5}],
        "verifier": [],
    }
    assert memory_metrics(replies) == {
        "cluster/memory_rollout_mb": 7.0,
        "cluster/gpu_memory_rollout_mb": 70.0,
        "cluster/memory_learner_mb": 9.0,
        "cluster/node_memory_share": 0.5,
    }


def test_usage_of_this_process():
    facts = usage.usage()
    assert facts["pid"] == os.getpid() and facts["node"]
    assert 1 < facts["rss_mb"] <= facts["peak_rss_mb"] < 10**6
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    grown = usage.usage()
    del block
    assert grown["rss_mb"] >= facts["rss_mb"] + 60 and grown["peak_rss_mb"] >= grown["rss_mb"]
    assert usage.usage()["peak_rss_mb"] >= grown["rss_mb"] - 1 and 0 < facts["node_memory_share"] < 1


def test_memory_of_a_container_is_of_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "PROC", tmp_path)
    monkeypatch.setattr(usage, "CGROUP", tmp_path / "cgroup")
    assert usage.node_memory_share() is None and "node_memory_share" not in usage.usage()
    assert usage.resident_mb()[0] > 1, "the peak, from the system call"
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\nMemAvailable:    250 kB\n")
    assert usage.node_memory_share() == 0.75
    (tmp_path / "cgroup").mkdir()
    for name, text in (("memory.max", "max\n"), ("memory.current", "900\n"), ("memory.stat", "anon 5\ninactive_file 100\n")):
        (tmp_path / "cgroup" / name).write_text(text)
    assert usage.node_memory_share() == 0.75, "no limit"
    (tmp_path / "cgroup" / "memory.max").write_text("1000\n")
    assert usage.node_memory_share() == 0.8, "pages of files are given back first"


def wait_until(true, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def test_the_sampler_keeps_the_most_and_the_newest_count_of_nodes():
    values = iter([{"object_store_mb": 5.0, "nodes": 3.0}, {"object_store_mb": 2.0, "nodes": 2.0}])
    done = threading.Event()

    def state():
        try:
            return next(values)
        except StopIteration:
            done.set()
            raise RuntimeError("nothing more") from None

    sampler = Sampler(pytest.fail, every_s=0.001, state=state)
    assert done.wait(20)
    assert sampler.reading() == {"object_store_mb": 5.0, "nodes": 2.0} and sampler.reading() == {}
    sampler.close()


def test_a_cluster_that_does_not_answer_is_said_once():
    said = []

    def state():
        raise ConnectionError("the head is gone")

    sampler = Sampler(said.append, every_s=0.0, state=state)
    wait_until(lambda: said)
    sampler.close()
    assert len(said) == 1 and "ConnectionError: the head is gone" in said[0] and sampler.reading() == {}


def test_the_state_of_a_real_cluster(ray_session):
    import numpy as np
    import ray

    before = cluster_state()
    assert before["nodes"] == 1.0 and 0 <= before["object_store_share"] < 1 and before["memory_driver_mb"] > 10
    block = ray.put(np.zeros(30 * 2**20, np.uint8))
    wait_until(lambda: cluster_state()["object_store_mb"] >= before["object_store_mb"] + 29)
    share = cluster_state()["object_store_share"]
    assert share >= 29 * 2**20 / ray.cluster_resources()["object_store_memory"]
    del block


def test_without_a_cluster_the_driver_is_measured(monkeypatch):
    monkeypatch.delitem(resources.sys.modules, "ray", raising=False)
    assert set(cluster_state()) <= {"memory_driver_mb", "node_memory_share"}


def log_steps(monitor: Monitor, steps, **metrics) -> None:
    for step in steps:
        monitor.log(step, {"reward/mean": step / 10, "rollout/groups": 4.0, "perf/step_s": 2.0} | metrics)
        monitor.samples(step, [sample(step)])
        monitor.prompts(step, {"trained": [step], "without_signal": [], "failed": []})


def test_going_back_drops_what_came_later_and_says_what_was_lost(tmp_path):
    monitor = open_monitor(tmp_path)
    log_steps(monitor, range(1, 7))
    files_of = {name: (monitor.run_dir / name).read_bytes() for name in ("metrics.jsonl", "prompts.jsonl")}
    lost = monitor.rewind(4, "learner rank 1 died")
    assert (lost.steps, lost.groups) == (2, 8) and 4.0 <= lost.seconds < 60
    assert steps_of(monitor.run_dir) == [1, 2, 3, 4] == monitor.store.steps()
    assert [line["step"] for line in read_lines(monitor.run_dir / "prompts.jsonl")] == [1, 2, 3, 4]
    log_steps(monitor, (5, 6))
    assert files_of == {name: (monitor.run_dir / name).read_bytes() for name in files_of}, "as if nothing had been"
    monitor.finish({"steps": 6}, status="finished")
    summary = json.loads((monitor.run_dir / "summary.json").read_text())["cluster"]
    assert (summary["rollbacks"], summary["lost_steps"], summary["lost_groups"]) == (1, 2, 8)
    console = monitor.console.stream.getvalue()
    assert "back to step 4: learner rank 1 died; 2 steps (8 groups, 4.0 s) are done again" in console
    assert "1 rollback, 2 steps or 4.0 s of work done again" in console
    with pytest.raises(ValueError, match="in order"):
        monitor.prompts(6, {"trained": []})


def test_a_run_that_went_back_before_its_first_step_starts_over(tmp_path):
    monitor = open_monitor(tmp_path)
    assert monitor.rewind(0) == Lost(0, 0, 0.0)
    monitor.log(0, {"eval/accuracy": 0.5})
    log_steps(monitor, (1, 2))
    lost = monitor.rewind(-1)
    assert lost.steps == 2 and steps_of(monitor.run_dir) == [], "the evaluation before the first step is no lost step"
    log_steps(monitor, (1,))


def test_a_crash_while_going_back_leaves_the_old_or_the_new_file(tmp_path, monkeypatch):
    log = StepLog(tmp_path / "prompts.jsonl")
    for step in range(4):
        log.append(step, {"trained": [step]})
    whole = log.path.read_bytes()

    def crash(*_):
        raise OSError(5, "power is gone")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(CheckpointError):
        log.rewind(1)
    assert log.path.read_bytes() == whole
    monkeypatch.undo()
    width = len(whole) // 4
    for cut in range(len(whole)):
        log.path.write_bytes(whole[:cut])
        again = StepLog(log.path, resume_step=1)
        assert [line["step"] for line in read_lines(log.path)] == [step for step in (0, 1) if cut >= width * (step + 1)]
        again.append(2, {"trained": []})


def test_lost_work_survives_the_driver(tmp_path):
    monitor = open_monitor(tmp_path)
    log_steps(monitor, range(1, 6))
    monitor.rewind(4)
    log_steps(monitor, (5,))
    monitor.incident("restart", "rollout worker 0 was replaced", track="rollout 0")
    with (monitor.run_dir / "incidents.jsonl").open("a") as file:
        file.write('{"time": 3, "ki')

    resumed = open_monitor(tmp_path, resume={"step": 3, "wandb_id": None})
    log_steps(resumed, range(4, 8))
    resumed.finish({"steps": 7}, status="finished")
    summary = json.loads((resumed.run_dir / "summary.json").read_text())["cluster"]
    assert {key: summary[key] for key in ("restarts", "rollbacks", "resumes", "lost_steps", "lost_groups")} == {
        "restarts": 1, "rollbacks": 1, "resumes": 1, "lost_steps": 1 + 2, "lost_groups": 12
    }  # fmt: skip
    kinds = [(line["kind"], line["step"]) for line in read_incidents(resumed.run_dir / "incidents.jsonl")]
    assert kinds == [("rollback", 5), ("restart", 6), ("resume", 4)]
    assert resumed.warnings == 0, "a resume is no warning"


def test_whoever_has_no_monitor_tells_the_logger(tmp_path):
    monitor = open_monitor(tmp_path)
    monitor.log(3, {"reward/mean": 0.0})
    log = logging.getLogger("rlpipe")
    log.warning("rollout worker %d is replaced", 2, extra={"incident": "restart", "track": "rollout 2"})
    log.warning("unit %d is tried again", 7, extra={"incident": "retry"})
    log.warning("something else")
    assert monitor.warnings == 2
    restart, retry = read_incidents(monitor.run_dir / "incidents.jsonl")
    assert (restart["kind"], restart["step"], restart["track"]) == ("restart", 4, "rollout 2")
    assert retry["text"] == "unit 7 is tried again" and retry["track"] == "driver"
    assert (monitor.run_dir / "log.txt").read_text().count("rollout worker 2 is replaced") == 1
    with pytest.raises(ValueError, match="no kind of incident"):
        monitor.incident("explosion", "x")


def test_incidents_from_many_threads_are_all_there(tmp_path):
    monitor = open_monitor(tmp_path)

    def work(worker: int):
        for index in range(20):
            monitor.incident("retry", f"unit {index}", track=f"rollout {worker}")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_incidents(monitor.run_dir / "incidents.jsonl")
    assert len(found) == 120 and totals(found)["retries"] == 120 == monitor.incidents.totals["retries"]


def test_an_incident_that_cannot_be_written_harms_nobody(tmp_path, monkeypatch):
    monitor = open_monitor(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for _ in range(3):
        monitor.incident("retry", "unit 1 is tried again")
    assert monitor.incidents.totals["retries"] == 3
    assert monitor.console.stream.getvalue().count("incidents.jsonl cannot be written") == 1


def test_what_the_monitor_knows_joins_the_metrics(tmp_path):
    monitor = open_monitor(tmp_path)
    monitor.watch()
    monitor.watch()
    now = time.time()
    monitor.timeline.span("rollout 0", "unit", now - 5, now)
    monitor.incident("restart", "rollout worker 0 was replaced")
    monitor.memory({"learner": [usage.usage()]})
    wait_until(lambda: monitor._sampler._most)
    monitor.log(1, {"reward/mean": 0.5, "cluster/restarts": 7.0}, lags=[0, 1, 1])
    (line,) = (json.loads(text) for text in (monitor.run_dir / "metrics.jsonl").read_text().splitlines())
    assert line["cluster/restarts"] == 7.0 and line["cluster/retries"] == 0.0, "what is given wins"
    assert line["rollout/lag_max"] == 1.0 and line["rollout/lag_share_1"] == pytest.approx(2 / 3)
    assert 0.0 <= line["cluster/idle_rollout"] <= 1.0 and line["cluster/memory_learner_mb"] > 1
    assert line["cluster/memory_driver_mb"] > 1
    monitor.finish({"steps": 1}, status="finished")
    summary = json.loads((monitor.run_dir / "summary.json").read_text())["cluster"]
    assert summary["max_lag"] == 1 and "idle" not in summary, "no step had a length to weigh by"


def test_the_summary_weighs_idle_shares_by_time():
    lines = [
        {"step": 0, "cluster/idle_rollout": 1.0},
        {"step": 1, "cluster/idle_rollout": 0.5, "perf/step_s": 1.0, "rollout/lag_max": 2.0},
        {"step": 2, "cluster/idle_rollout": 0.0, "perf/step_s": 3.0, "rollout/lag_max": None},
    ]
    summary = cluster_summary(lines, totals([{"kind": "timeout"}, {"kind": "unknown", "lost_seconds": "x"}]))
    assert summary["max_lag"] == 2 and summary["idle"] == {"rollout": 0.125}
    assert summary["timeouts"] == 1 and summary["lost_seconds"] == 0
    assert fault_line(summary) == "1 timeout" and fault_line(totals([])) == ""
    assert lost_work([]) == Lost(0, 0, 0.0) and str(Lost(0, 0, 0.0)) == "no finished step is done again"


def test_mode_async_has_more_columns_and_fits():
    assert columns_of("sync") == COLUMNS and columns_of("async")[-3:] == ASYNC_COLUMNS
    columns = columns_of("async")
    assert (
        header(columns).split()[-3:] == ["lag", "ready", "idle"] and len(header(COLUMNS)) <= 80 and len(header(columns)) <= 100
    )
    text = row(7, {"rollout/lag_max": 2.0, "cluster/groups_ready": 12.0, "cluster/idle_rollout": 0.25}, columns)
    assert text.split() == ["7", "2", "12", "0.25"] and len(text) == len(header(columns))


def test_the_report_has_a_section_for_the_cluster(tmp_path):
    cfg = RunConfig(name="toy", output_dir=str(tmp_path), mode="async", monitor=MonitorConfig(wandb="disabled"))
    monitor = Monitor(tmp_path / "toy" / "a", cfg, config_yaml="name: toy\n", stream=io.StringIO())
    now = time.time()
    for step in range(1, 6):
        monitor.timeline.span("driver", "step", now + step, now + step + 1, step=step)
        monitor.timeline.span("learner", "update", now + step, now + step + 0.6)
        monitor.timeline.span("rollout 0", "unit", now + step, now + step + 0.9)
        if step == 3:
            monitor.incident("restart", "worker <b>0</b> was replaced")
        log_steps(monitor, [step], **{"cluster/groups_ready": float(step)})
    monitor.finish({"steps": 5}, status="finished")
    text = (monitor.run_dir / "report.html").read_text()
    page = Page(text)
    assert not page.open and page.tags.count("rect") == 12 and "b" in page.tags
    assert "<h2>Cluster</h2>" in text and "step 3: 1 × restart" in text and "Incidents: 1" in text
    assert "worker <b>" not in text and "worker &lt;b&gt;0" in text
    assert "the learner worked 0.600 s of each, a rollout worker 0.900 s on average: 1.11 × the longer" in text
    assert "  step  reward" in monitor.console.stream.getvalue() and " ready idle" in monitor.console.stream.getvalue()


def test_a_run_without_a_cluster_has_no_such_section(tmp_path):
    monitor = open_monitor(tmp_path)
    monitor.log(1, {"sft/loss": 1.0})
    monitor.finish({"steps": 1}, status="finished")
    assert "<h2>Cluster</h2>" not in (monitor.run_dir / "report.html").read_text()
    assert not (monitor.run_dir / "prompts.jsonl").exists() and not (monitor.run_dir / "incidents.jsonl").exists()
    assert not (monitor.run_dir / "timeline.json").exists()
