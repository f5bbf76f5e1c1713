"""The timeline: many writers, any end, the next start, and the arithmetic on what it says."""

import errno
import io
import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from test_monitor import config, open_monitor

from rlpipe.config import MonitorConfig, RunConfig
from rlpipe.errors import CheckpointError, ConfigError
from rlpipe.monitor import __main__ as command
from rlpipe.monitor import overlap, timeline
from rlpipe.monitor.gantt import BARS, PER_ROLE, gantt
from rlpipe.monitor.monitor import Monitor
from rlpipe.monitor.overlap import table, use_of
from rlpipe.monitor.spans import Span, Trace, intersection, length, read_trace, subtraction, union, working
from rlpipe.monitor.timeline import NAME, OLD_NAME, Timeline


def opened(folder: Path, **options) -> Timeline:
    return Timeline(folder / NAME, **{"warn": pytest.fail, "every_s": 60.0} | options)


def written(folder: Path, count: int = 5) -> bytes:
    """A closed timeline with `count` spans of one second each."""
    told = opened(folder)
    for index in range(count):
        told.span(f"rollout {index % 2}", f"unit {index}", 100.0 + index, 101.0 + index, version=index, tokens=np.int64(7))
    told.mark("rollout 1", "restart", 102.5, text="worker 1 died")
    told.count("queues", 103.0, ready=2)
    told.close()
    return (folder / NAME).read_bytes()


def test_a_finished_file_is_a_json_array_of_trace_events(tmp_path):
    events = json.loads(written(tmp_path))
    assert {event["ph"] for event in events} == {"M", "X", "i", "C"}
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert set(names.values()) == {"driver", "rollout 0", "rollout 1"}
    spans = [event for event in events if event["ph"] == "X"]
    assert [(names[event["pid"], event["tid"]], event["name"], event["ts"], event["dur"]) for event in spans] == [
        (f"rollout {i % 2}", f"unit {i}", (100 + i) * 1e6, 1e6) for i in range(5)
    ]
    assert spans[3]["args"] == {"version": 3, "tokens": 7}
    assert all(event["pid"] > 0 and event["tid"] > 0 for event in events)
    assert len({event["tid"] for event in events}) == 3, "no thread number in two processes"
    assert [event["args"] for event in events if event["ph"] == "C"] == [{"ready": 2}]


def test_what_was_written_is_read(tmp_path):
    written(tmp_path)
    trace = read_trace(tmp_path)
    assert trace.damaged == 0 and len(trace.starts) == 1
    assert trace.spans[1] == Span("rollout 1", "unit 1", 101.0, 102.0, {"version": 1, "tokens": 7})
    assert trace.marks == [Span("rollout 1", "restart", 102.5, 102.5, {"text": "worker 1 died"})]
    assert trace.tracks() == ["rollout 0", "rollout 1"]


def test_a_file_cut_at_any_byte_is_read_and_continued(tmp_path):
    whole = written(tmp_path, 3)
    for cut in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole[:cut])
        before = read_trace(tmp_path)
        assert before.damaged <= 1 and len(before.spans) <= 3
        again = opened(tmp_path)
        again.span("learner", "update", 200.0, 201.0)
        again.close()
        assert isinstance(json.loads((tmp_path / NAME).read_bytes()), list), f"cut at {cut}"
        after = read_trace(tmp_path)
        assert after.damaged == 0 and after.spans == [*before.spans, Span("learner", "update", 200.0, 201.0)]


def test_a_block_of_zeros_at_the_end_is_cut_off(tmp_path):
    whole = written(tmp_path, 3)
    (tmp_path / NAME).write_bytes(whole[:-20] + bytes(500))
    again = opened(tmp_path)
    again.span("learner", "update", 200.0, 201.0)
    again.close()
    assert len(json.loads((tmp_path / NAME).read_bytes())) > 5 and len(read_trace(tmp_path).spans) == 4


def test_spans_that_touch_do_not_overlap_in_the_file(tmp_path):
    """Two that overlap by less than a microsecond are one too many for Perfetto's importer."""
    told, rng, at = opened(tmp_path), random.Random(0), 1_795_284_931.0
    for index in range(500):
        end = at + rng.random() / 1000
        told.span("learner", f"update {index}", at, end)
        at = end
    told.close()
    spans = [event for event in json.loads((tmp_path / NAME).read_bytes()) if event["ph"] == "X"]
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in zip(spans, spans[1:], strict=False))


def test_blocks_inside_blocks_lie_strictly_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(timeline.time, "time", lambda: next(clock))
    clock = iter([0.0, *[1_795_284_931.0] * 3, *[1_795_284_932.0] * 3])
    told = opened(tmp_path)
    with told.timed("driver", "step", step=1), told.timed("driver", "update"), told.timed("learner", "update"):
        pass
    monkeypatch.undo()
    told.close()
    events = {(e["pid"], e["name"]): e for e in json.loads((tmp_path / NAME).read_bytes()) if e["ph"] == "X"}
    outer, inner, other = events[1, "step"], events[1, "update"], events[2, "update"]
    assert outer["ts"] < inner["ts"] and inner["ts"] + inner["dur"] < outer["ts"] + outer["dur"]
    assert (other["ts"], other["dur"]) == (outer["ts"], outer["dur"]), "another track is another row"


def test_lines_of_somebody_else_are_counted_and_skipped(tmp_path):
    whole = written(tmp_path, 2).decode()
    odd = ["[1]", "3", '{"ph": "X"}', '{"ph": "X", "pid": 1, "tid": 9, "name": "?", "ts": 1, "dur": 1}', '{"args": [1, 2]}']
    (tmp_path / NAME).write_text(whole.replace("\n]", ",\n" + ",\n".join(odd) + "\n]"))
    trace = read_trace(tmp_path)
    assert trace.damaged == len(odd) and len(trace.spans) == 2


def test_a_running_timeline_can_be_read(tmp_path):
    told = opened(tmp_path)
    for index in range(3):
        told.span("learner", "update", index, index + 0.5)
        told.flush()
        assert len(read_trace(tmp_path).spans) == index + 1
    told.close()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    written(tmp_path)
    written(tmp_path)
    events = json.loads((tmp_path / NAME).read_bytes())
    assert sum(event["ph"] == "X" for event in events) == 10
    assert len(read_trace(tmp_path).starts) == 2
    opened(tmp_path).close()
    assert len(json.loads((tmp_path / NAME).read_bytes())) == len(events), "a start without a word leaves the file alone"


def test_threads_lose_nothing(tmp_path):
    told = opened(tmp_path, every_s=0.001)

    def work(worker: int):
        for index in range(500):
            told.span(f"rollout {worker}", f"unit {index}", index, index + 1, worker=worker)
            if index % 50 == 0:
                told.flush()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.close()
    events = json.loads((tmp_path / NAME).read_bytes())
    seen = sorted((e["args"]["worker"], int(e["name"].split()[1])) for e in events if e["ph"] == "X")
    assert seen == [(worker, index) for worker in range(8) for index in range(500)]


def test_the_size_is_bounded_and_both_files_stand_alone(tmp_path):
    told = opened(tmp_path, limit_mb=0.02)
    for index in range(400):
        told.span("rollout 0", f"unit {index}", index, index + 1)
        if index % 10 == 9:
            told.flush()
    told.close()
    sizes = [(tmp_path / name).stat().st_size for name in (NAME, OLD_NAME)]
    assert sum(sizes) < 0.02 * 2**20 + 2000
    for name in (NAME, OLD_NAME):
        assert json.loads((tmp_path / name).read_bytes())[0]["name"] == "process_name"
    kept = [int(span.name.split()[1]) for span in read_trace(tmp_path).spans]
    assert kept == list(range(400 - len(kept), 400)) and len(kept) > 50


def test_odd_arguments_cost_nothing_but_themselves(tmp_path):
    told = opened(tmp_path, warn=lambda text: said.append(text))
    said, circular = [], []
    circular.append(circular)
    told.span("rollout", 'a "name"\n\ud800', 0.9, 0.5, path=Path("x"), share=float("nan"), kind={"a": object})
    told.span("strange role 12", "b", 1.0, float("nan"))
    told.span("strange role 12", "c", 1.0, 2.0, odd=circular)
    told.span("strange role 12", "d", 1.0, 2.0)
    told.close()
    told.span("rollout", "late", 1.0, 2.0)
    first, last = read_trace(tmp_path).spans
    assert first.name == 'a "name"\n\ud800' and first.end == first.start and first.args["share"] is None
    assert last.track == "strange role 12" and last.name == "d"
    assert len(said) == 1 and said[0].startswith("2 events are missing")


def test_a_full_disk_ends_the_timeline_and_is_said_once(tmp_path, monkeypatch):
    said = []
    told = opened(tmp_path, warn=said.append)
    told.span("learner", "update", 1.0, 2.0)

    def full(path, mode):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    told.flush()
    for _ in range(3):
        told.span("learner", "update", 2.0, 3.0)
        told.flush()
    told.close()
    assert len(said) == 1 and "No space left" in said[0] and NAME in said[0]


def test_timed_blocks_say_how_they_ended(tmp_path):
    told = opened(tmp_path)
    with told.timed("learner", "update", step=3) as args:
        args["tokens"] = 12
    with pytest.raises(KeyError), told.timed("weights", "publish"):
        raise KeyError("x")
    told.close()
    update, publish = read_trace(tmp_path).spans
    assert update.args == {"step": 3, "tokens": 12} and 0 <= update.end - update.start < 10
    assert not publish.succeeded and publish.args["error"] == "KeyError"


def test_without_a_path_spans_are_heard_and_nothing_is_written(tmp_path):
    heard = []
    told = Timeline(None, warn=pytest.fail, heard=lambda *span: heard.append(span))
    told.span("rollout 0", "unit", 1.0, 2.0, version=3)
    told.mark("driver", "rollback")
    told.close()
    assert heard == [("rollout 0", "unit", 1.0, 2.0)] and not list(tmp_path.iterdir())
    cfg = RunConfig(name="toy", output_dir=str(tmp_path), monitor=MonitorConfig(wandb="disabled", timeline=False))
    monitor = Monitor(tmp_path / "toy" / "a", cfg, config_yaml="name: toy\n", stream=io.StringIO())
    monitor.timeline.span("rollout 0", "unit", 1.0, 2.0)
    monitor.finish({}, status="finished")
    assert not (monitor.run_dir / NAME).exists()


def points(intervals, grid) -> np.ndarray:
    return np.array([any(start <= x < end for start, end in intervals) for x in grid])


def test_interval_arithmetic_against_points():
    rng, grid = random.Random(1), np.arange(0.5, 40)
    for _ in range(200):
        a, b = ([(s, s + rng.randrange(6)) for s in rng.sample(range(36), rng.randrange(6))] for _ in range(2))
        on_a, on_b = points(a, grid), points(b, grid)
        a, b = union(a), union(b)
        assert (points(a, grid) == on_a).all() and length(a) == on_a.sum()
        assert all(x[1] < y[0] for x, y in zip(a, a[1:], strict=False)), "disjoint, ordered, merged"
        assert (points(intersection(a, b), grid) == (on_a & on_b)).all()
        assert (points(subtraction(a, b), grid) == (on_a & ~on_b)).all()
        assert length(intersection(a, b)) == (on_a & on_b).sum()


def trace_of(*spans: tuple, starts: tuple = (), marks: tuple = ()) -> Trace:
    found = [Span(track, name, float(start), float(end), args) for track, name, start, end, args in spans]
    return Trace(sorted(found, key=lambda span: span.start), list(marks), list(starts))


def a_trace(workers: int = 2, steps: int = 4) -> Trace:
    """Steps of 10 s: the learner works from 2 to 8, worker i samples from 0 to 5 + i; between steps nothing happens for 2 s."""
    spans = []
    for step in range(1, steps + 1):
        at = 12.0 * step
        spans += [("driver", "step", at, at + 10, {"step": step}), ("driver", "wait for groups", at, at + 2, {})]
        spans += [("learner", "update", at + 2, at + 8, {}), ("learner", "wait for the others", at + 8, at + 10, {})]
        spans += [(f"rollout {i}", "unit", at, at + 5 + i, {"ok": i != 1}) for i in range(workers)]
    return trace_of(*spans)


def test_shares_and_overlap():
    use = use_of(a_trace())
    shares = {one.track: one.share for one in use.tracks}
    whole = 4 * 10 + 3 * 2
    assert use.seconds == whole
    assert shares == pytest.approx(
        {"driver": 32 / whole, "learner": 24 / whole, "rollout 0": 20 / whole, "rollout 1": 24 / whole}
    )
    assert [one.track for one in use.tracks] == ["driver", "learner", "rollout 0", "rollout 1"]
    assert use.overlap == pytest.approx(4 / 6) and use.overlap_mean == pytest.approx((3 / 6 + 4 / 6) / 2)
    assert (use.steps, use.step_s, use.learner_s, use.rollout_s) == (4, 10.0, 6.0, 5.5)
    assert use.efficiency == pytest.approx(10 / 6)
    assert {one.track: one.failed for one in use.tracks}["rollout 1"] == 4
    some = use_of(a_trace(), 2, 3)
    assert (some.steps, some.seconds, some.learner_s) == (2, 20.0, 6.0)
    assert {one.track: one.share for one in some.tracks}["learner"] == 0.6
    assert use_of(a_trace(), 90).tracks == [] and use_of(Trace()).seconds == 0.0


def test_the_time_between_two_starts_does_not_count():
    spans = [("learner", "update", 100, 110, {}), ("learner", "update", 500, 510, {})]
    assert use_of(trace_of(*spans)).tracks[0].share == pytest.approx(20 / 410)
    assert use_of(trace_of(*spans, starts=(101.0, 499.0))).tracks[0].share == 1.0, "clocks may differ a little"


def test_waits_inside_work_do_not_count():
    spans = a_trace().by_track()["driver"]
    assert working(spans, [(12.0, 22.0)]) == [(14.0, 22.0)]


def test_large_roles_are_summed_up():
    lines = table(use_of(a_trace(workers=overlap.LISTED + 1)))
    assert not any(line.startswith("rollout 0") for line in lines)
    assert any(line.startswith(f"rollout, mean of {overlap.LISTED + 1}") for line in lines)
    assert lines[-1].startswith("4 steps of 10.000 s, the learner worked 6.000 s of each")


def test_the_command(tmp_path, capsys):
    told = opened(tmp_path)
    for span in a_trace().spans:
        told.span(span.track, span.name, span.start, span.end, **span.args)
    told.mark("rollout 1", "restart", 30.0, text="rollout worker 1 was replaced")
    told.close()
    assert command.main(["timeline", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (
        "24 spans in all, of 1 start; 46.0 s looked at" in out
        and "66.7%" in out
        and "rollout 1: rollout worker 1 was replaced" in out
    )
    assert command.main(["timeline", str(tmp_path), "steps=2-3"]) == 0
    assert "2 steps of 10.000 s" in capsys.readouterr().out
    assert command.main(["timeline", str(tmp_path), "steps=3"]) == 0
    assert "1 steps of" in capsys.readouterr().out
    assert command.main(["timeline", str(tmp_path / "none")]) == 1
    assert "monitor.timeline=false" in capsys.readouterr().err
    assert command.main(["timeline", str(tmp_path), "step=3"]) == 2 and command.main(["timeline"]) == 2
    with pytest.raises(ConfigError, match="steps=20-40"):
        overlap.main(tmp_path, ["steps=a-b"])
    with pytest.raises(CheckpointError):
        read_trace(tmp_path / "none")


def test_the_picture_shows_the_last_steps():
    svg = gantt(a_trace(workers=PER_ROLE + 2, steps=7))
    assert svg.count("<rect") == 4 * (2 + 2 + PER_ROLE) and "not shown: 2 more rollout" in svg
    assert svg.count("bar-failed") == 4 and svg.count("bar-wait") == 8
    widths = [float(part.split('"')[0]) for part in svg.split('width="')[1:]]
    assert all(0 < width <= 1000 for width in widths)
    assert gantt(Trace()) == ""


def test_the_picture_is_bounded_and_escaped():
    mark = Span("driver", "rollback", 15.0, 15.0, {"text": '<b>"'})
    spans = [(f"rollout {i % 3}", "<i>", 10 + i / 1000, 10 + i / 1000 + (i % 7) / 1e4, {}) for i in range(30_000)]
    svg = gantt(trace_of(*spans, marks=(mark,)))
    assert svg.count("<rect") <= BARS + 60 and len(svg) < 400_000
    assert "<i>" not in svg and "&lt;i&gt;" in svg and "&lt;b&gt;&quot;" in svg


def test_the_monitor_owns_one(tmp_path):
    monitor = open_monitor(tmp_path)
    with monitor.timeline.timed("driver", "step", step=1):
        monitor.timeline.span("rollout 0", "unit", 5.0, 6.0)
    monitor.incident("restart", "rollout worker 0 was replaced", track="rollout 0")
    monitor.log(1, {"reward/mean": 0.5, "cluster/groups_ready": 3.0})
    monitor.finish({"steps": 1}, status="finished")
    trace = read_trace(monitor.run_dir)
    assert [span.name for span in trace.steps()] == ["step"] and [mark.name for mark in trace.marks] == ["restart"]
    assert '"groups_ready": 3.0' in (monitor.run_dir / NAME).read_text()
    assert str(monitor.run_dir / NAME) in monitor.console.stream.getvalue()
    assert "Who worked when" in (monitor.run_dir / "report.html").read_text()
    monitor.timeline.close()
    assert config(tmp_path).monitor.timeline and timeline.NAME == "timeline.json"
