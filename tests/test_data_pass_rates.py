"""Measured pass rates: written by a run, read by the next to choose and order its records."""

import json

import pytest

from rlpipe.config import DataConfig
from rlpipe.data import pass_rates
from rlpipe.data.pass_rates import PassRateLog
from rlpipe.data.registry import build_source
from rlpipe.data.source import Cursor
from rlpipe.errors import CheckpointError, ConfigError, DataError


def files(tmp_path, count=10):
    for name, start in (("train", 0), ("test", 100)):
        lines = [json.dumps({"prompt": f"p{i}", "answer": str(i)}) for i in range(start, start + count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {"task": "records", "train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}


def measured(tmp_path, rates):
    """A log in which p<i> was solved rates[i] of four times; None for never asked. Returns the settings."""
    settings, log = files(tmp_path), PassRateLog(tmp_path / pass_rates.NAME)
    cursor = Cursor(build_source(DataConfig(**settings), 0), log)
    for prompt in cursor.take(10):
        rate = rates[int(prompt.text[1:])]
        if rate is not None:
            cursor.solved([(prompt, [float(i < 4 * rate) for i in range(4)])])
    return settings | {"pass_rates": str(tmp_path / pass_rates.NAME)}


RATES = [0.0, 0.25, 0.5, 0.75, 1.0, 0.25, 0.5, 0.75, None, None]


def shown(settings, turn=0, seed=0, **more):
    made = build_source(DataConfig(**settings, **more), seed)
    return [made.prompt(turn * made.size + i).text for i in range(made.size)]


def rate(text):
    return RATES[int(text[1:])]


def test_a_run_logs_how_often_each_prompt_was_solved(tmp_path):
    settings = measured(tmp_path, RATES)
    lines = [json.loads(line) for line in (tmp_path / pass_rates.NAME).read_text().splitlines()]
    assert len(lines) == 8 and set(lines[0]) == {"uid", "record", "mean", "count"} and lines[0]["count"] == 4
    found = pass_rates.read(settings["pass_rates"])
    assert found == pass_rates.read(str(tmp_path)) and sorted(mean for mean, _ in found.values()) == sorted(
        rate for rate in RATES if rate is not None
    )


def test_passes_add_up_and_repeated_steps_count_once(tmp_path):
    log = PassRateLog(tmp_path / pass_rates.NAME)
    made = build_source(DataConfig(**files(tmp_path)), 0)
    first, again = made.prompt(0), next(p for p in map(made.prompt, range(10, 20)) if p.text == made.prompt(0).text)
    assert first.uid != again.uid and first.record == again.record
    log.add([(first, [1.0, 0.0])])
    log.add([(again, [1.0] * 6)])
    log.add([(first, [0.0, 0.0])])  # the step was done anew after a resume: the same uid
    log.add([(build_source(DataConfig(), 0).prompt(3), [1.0])])
    log.add([])
    found = pass_rates.read(str(tmp_path))
    assert found == {first.record: (0.75, 8), "sudoku/train/3": (1.0, 1)}
    Cursor(made).solved([(first, [1.0])])  # a cursor without a log


def test_a_line_that_a_killed_run_left_half_written_is_cut_off(tmp_path):
    log, made = PassRateLog(tmp_path / pass_rates.NAME), build_source(DataConfig(**files(tmp_path)), 0)
    first, second = made.prompt(0), made.prompt(1)
    log.add([(first, [1.0])])
    for torn in ('{"uid": "rec', '{"uid": "x", "record": "x", "mean": 1.0, "count": 1}'):
        with (tmp_path / pass_rates.NAME).open("a") as file:
            file.write(torn)
        log.add([(second, [0.0])])
        assert pass_rates.read(str(tmp_path)) == {first.record: (1.0, 1), second.record: (0.0, 1)}
    (tmp_path / pass_rates.NAME).write_text('{"uid"')
    log.add([(second, [0.0])])
    assert pass_rates.read(str(tmp_path)) == {second.record: (0.0, 1)}


def test_difficulty_leaves_out_what_is_too_easy_or_too_hard(tmp_path, caplog):
    settings = measured(tmp_path, RATES)
    assert len(shown(settings)) == 10
    texts = shown(settings, difficulty=[0.2, 0.8])
    assert sorted(texts) == ["p1", "p2", "p3", "p5", "p6", "p7", "p8", "p9"]  # those without a figure stay
    assert "8 of 10 records used, shape rlpipe; left out: 2 too easy or too hard" in caplog.text
    assert "pass rate 1.000 outside 0.2 to 0.8" in caplog.text
    with pytest.raises(DataError, match="leaves none of the 10 records"):
        shown(measured(tmp_path, [1.0] * 10), difficulty=[0.2, 0.8])


def test_rewards_above_one_are_no_reason_to_leave_a_record_out(tmp_path):
    settings, log = files(tmp_path), PassRateLog(tmp_path / pass_rates.NAME)
    log.add((build_source(DataConfig(**settings), 0).prompt(i), [2.0]) for i in range(3))
    found = shown(settings | {"pass_rates": str(tmp_path)}, curriculum="easy_to_hard")
    assert len(found) == 10 and len(shown(settings | {"pass_rates": str(tmp_path)}, difficulty=[0.0, 0.9])) == 7


def test_easy_to_hard_is_a_falling_pass_rate_with_equals_shuffled(tmp_path):
    settings = measured(tmp_path, RATES) | {"curriculum": "easy_to_hard"}
    first, second = shown(settings), shown(settings, turn=1)
    for texts in (first, second):
        known = [0.5 if rate(text) is None else rate(text) for text in texts]
        assert known == sorted(known, reverse=True)
    assert first == shown(settings) and first != second and first != shown(settings, seed=1)


def test_target_shows_what_is_nearest_to_the_middle_first(tmp_path):
    settings = measured(tmp_path, RATES) | {"curriculum": "target"}
    distances = [abs((0.5 if rate(text) is None else rate(text)) - 0.5) for text in shown(settings)]
    assert distances == sorted(distances)
    distances = [abs((0.5 if rate(text) is None else rate(text)) - 0.25) for text in shown(settings, difficulty=[0.0, 0.5])]
    assert distances == sorted(distances) and len(distances) == 7


def test_another_order_is_another_source_for_the_cursor(tmp_path):
    settings = measured(tmp_path, RATES)
    state = Cursor(build_source(DataConfig(**settings), 0)).state()
    for change in ({"curriculum": "target"}, {"difficulty": [0.2, 0.8]}):
        with pytest.raises(CheckpointError, match="resume=never"):
            Cursor(build_source(DataConfig(**settings, **change), 0)).restore(state)
    ordered = Cursor(build_source(DataConfig(**settings, curriculum="target"), 0))
    ordered.take(7)
    other = measured(tmp_path, RATES[::-1])  # the file has grown: another order under the same name
    with pytest.raises(CheckpointError, match="resume=never"):
        Cursor(build_source(DataConfig(**other, curriculum="target"), 0)).restore(ordered.state())
    (tmp_path / pass_rates.NAME).unlink()
    measured(tmp_path, RATES)
    fresh = Cursor(build_source(DataConfig(**settings, curriculum="target"), 0))
    fresh.restore(json.loads(json.dumps(ordered.state())))
    assert fresh.take(8) == ordered.take(8)


def test_rates_that_cannot_be_used_are_named(tmp_path):
    settings = files(tmp_path)
    with pytest.raises(ConfigError, match="data.curriculum=target goes by measured pass rates; set data.pass_rates"):
        shown(settings, curriculum="target")
    with pytest.raises(ConfigError, match=r"data.difficulty=\[0.2, 0.8\] goes by"):
        shown(settings, difficulty=[0.2, 0.8])
    with pytest.raises(ConfigError, match="data.curriculum=hard is not one of"):
        shown(settings, curriculum="hard")
    with pytest.raises(ConfigError, match=r"data.difficulty=\[0.8, 0.2\]"):
        shown(settings, difficulty=[0.8, 0.2])
    with pytest.raises(DataError, match="there is no file nowhere"):
        shown(settings, pass_rates="nowhere")
    path = tmp_path / pass_rates.NAME
    path.write_text("")
    with pytest.raises(DataError, match="holds no figures yet"):
        shown(settings, pass_rates=str(path))
    good = json.dumps({"uid": "u", "record": "r", "mean": 0.5, "count": 2})
    for bad in ('{"uid": "u"}', good.replace("0.5", "NaN"), good.replace('"count": 2', '"count": 0'), "[1]", "{"):
        path.write_text(f"{good}\n{bad}\n{good}")
        with pytest.raises(DataError, match=rf"{pass_rates.NAME}:2: not a line of"):
            shown(settings, pass_rates=str(path))
    path.write_text(f'{good}\n{{"uid": "u", "rec')  # the run was stopped while it wrote
    assert pass_rates.read(str(path)) == {"r": (0.5, 2)}
    with pytest.raises(DataError, match="none of its records is in .*train.jsonl"):
        shown(settings, pass_rates=str(path))
