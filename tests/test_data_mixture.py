"""Mixtures: fixed shares whoever asks, parts that pass through their own records, exact resumption."""

import json
import random

import pytest

from rlpipe.config import DataConfig, RunConfig
from rlpipe.contradictions import check
from rlpipe.data.mixture import Mixture, Schedule
from rlpipe.data.registry import build_source
from rlpipe.data.source import Cursor
from rlpipe.errors import CheckpointError, ConfigError, DataError


def records(path, count, start=0, **facts):
    lines = [json.dumps({"prompt": f"{path.stem} {i}", "answer": str(i)} | facts) for i in range(start, start + count)]
    path.write_text("\n".join(lines))
    return str(path)


def parts(tmp_path):
    own = {"task": "records", "train": records(tmp_path / "own.jsonl", 7)}
    own["test"] = records(tmp_path / "held.jsonl", 3, start=90)
    return [
        own | {"weight": 3, "verifier": "math"},
        {"task": "reasoning_gym:gcd", "weight": 2},
        {"task": "sudoku", "options": {"clues_low": 6}},
    ]


def mixture(tmp_path, seed=0, **settings):
    return build_source(DataConfig(mixture=parts(tmp_path), **settings), seed)


def test_shares_hold_over_every_stretch():
    rng = random.Random(1)
    for weights in ([3, 2, 1], [1], [5, 5], [0.7, 0.2, 0.1], [rng.random() for _ in range(9)]):
        schedule, counts = Schedule(weights), [0] * len(weights)
        for index in range(3000):
            part, inner = schedule[index]
            assert inner == counts[part]
            counts[part] += 1
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - (index + 1) * weight / sum(weights)) < len(weights)


def test_the_schedule_can_be_asked_in_any_order():
    order = list(range(5000))
    random.Random(2).shuffle(order)
    one, other = Schedule([0.6, 0.3, 0.1]), Schedule([0.6, 0.3, 0.1])
    assert {index: one[index] for index in order} == {index: other[index] for index in range(5000)}


def test_parts_pass_through_their_own_records(tmp_path):
    made = mixture(tmp_path)
    prompts = [made.prompt(index) for index in range(84)]
    own = [prompt for prompt in prompts if prompt.task == "records"]
    assert len(own) == 42 and sum(p.task == "sudoku" for p in prompts) == 14
    assert sorted(p.text for p in own) == sorted([f"own {i}" for i in range(7)] * 6)
    assert [p.text for p in own[:7]] != [p.text for p in own[7:14]] and len({p.uid for p in prompts}) == 84
    assert own[0].uid.startswith("records/records/0/") and made.size is None
    again, other = mixture(tmp_path), mixture(tmp_path, seed=1)
    assert [again.prompt(i) for i in reversed(range(84))] == prompts[::-1]
    assert [other.prompt(i).text for i in range(84)] != [p.text for p in prompts]


def test_each_prompt_says_who_judges_it(tmp_path):
    made = mixture(tmp_path)
    assert made.verifier == "math" and made.verifiers == ("math", "reasoning_gym", "sudoku")
    judges = {(prompt.task, prompt.verifier) for prompt in map(made.prompt, range(12))}
    assert judges == {("records", ""), ("reasoning_gym:gcd", "reasoning_gym"), ("sudoku", "sudoku")}


@pytest.mark.parametrize("taken", [1, 5, 17, 23])
def test_resumption_in_the_middle_of_a_pass_is_exact(tmp_path, taken):
    straight = Cursor(mixture(tmp_path)).take(40)
    cursor = Cursor(mixture(tmp_path))
    cursor.take(taken)
    fresh = Cursor(mixture(tmp_path))
    fresh.restore(json.loads(json.dumps(cursor.state())))
    assert fresh.take(40 - taken) == straight[taken:]
    with pytest.raises(CheckpointError, match="resume=never"):
        Cursor(mixture(tmp_path, seed=3)).restore(cursor.state())


def test_held_out_prompts_come_in_the_same_shares_and_fill_up(tmp_path):
    made = mixture(tmp_path)
    held = made.test_prompts(12)
    assert len(held) == 12 and sum(prompt.task == "records" for prompt in held) == 3  # it has no more
    assert held[:5] == made.test_prompts(5) and len({prompt.uid for prompt in held}) == 12
    assert held == mixture(tmp_path, seed=4).test_prompts(12)


def test_what_one_part_holds_out_no_other_trains_on(tmp_path, caplog):
    shared = records(tmp_path / "shared.jsonl", 4)
    other = {"task": "records", "train": records(tmp_path / "other.jsonl", 2), "test": shared}
    first = {"task": "records", "train": shared, "test": records(tmp_path / "t.jsonl", 1)}
    with pytest.raises(DataError, match="every prompt of .*shared.jsonl is also held out"):
        build_source(DataConfig(mixture=[first, other]), 0)
    both = records(tmp_path / "both.jsonl", 2) and tmp_path / "both.jsonl"
    both.write_text(both.read_text() + "\n" + (tmp_path / "shared.jsonl").read_text())
    made = build_source(DataConfig(mixture=[first | {"train": str(both)}, other], template="Q: {prompt}"), 0)
    assert {made.prompt(i).text for i in range(20)} == {f"Q: {name} {i}" for name in ("both", "other") for i in (0, 1)}
    assert "2 of 6 records used" in caplog.text and len(made.reports) == 4


def test_templates_demonstrations_and_alphabets_of_parts(tmp_path):
    entries = [{"task": "sudoku", "template": "S {prompt}"}, {"task": "countdown", "name": "count"}, {"task": "countdown"}]
    made = build_source(DataConfig(mixture=entries, template="A: {prompt}"), 0)
    texts = [made.demonstration(index) for index in range(3)]
    assert [t.text[:2] for t in texts] == ["S ", "A:", "A:"] and all(t.demonstration for t in texts)
    assert [c.name for c in made.components] == ["sudoku", "count", "countdown"] and set("SA_+") <= set(made.alphabet)
    assert made.max_response_chars == 16 and "sudoku: S" not in made.template.label and "count" in made.template.label
    again = build_source(DataConfig(mixture=[{"task": "sudoku"}, {"task": "sudoku", "options": {"clues_low": 8}}]), 0)
    assert [c.name for c in again.components] == ["sudoku", "sudoku-2"] and again.template.label == "{prompt}"


def test_several_library_tasks_as_one():
    made = build_source(DataConfig(task="reasoning_gym:gcd+chain_sum", options={"chain_sum": {"max_terms": 2}}), 0)
    assert isinstance(made, Mixture) and made.verifiers == ("reasoning_gym",)
    assert [made.prompt(i).answer["dataset"] for i in range(4)] == ["gcd", "chain_sum"] * 2
    assert made.prompt(1).answer["options"] == {"max_terms": 2} and made.prompt(0).verifier == ""
    with pytest.raises(ConfigError, match="data.options.max_terms: for several tasks"):
        build_source(DataConfig(task="reasoning_gym:gcd+chain_sum", options={"max_terms": 2}), 0)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"task": "sudoku", "wight": 2}, r"data.mixture\[0\].wight.*did you mean weight"),
        ({"task": "sudoku", "weight": 0}, "weight=0: a number above 0"),
        ({"task": "sudoku", "weight": True}, "weight=True"),
        ({"weight": 1}, r"data.mixture\[0\] has no task"),
        ({"task": "sudokku"}, r"data.mixture\[0\] \(sudokku\): .*did you mean sudoku"),
        ({"task": "sudoku", "options": 3}, "options=3: expected a value like data.options"),
        ({"task": "sudoku", "max_prompt_chars": 10}, r"data.max_prompt_chars=10: task sudoku makes its prompts up"),
        ({"task": "records", "train": "nowhere.jsonl"}, r"\[0\] \(records\): data.train=nowhere.jsonl: no such file"),
    ],
)
def test_parts_that_are_wrong_are_named(entry, message):
    with pytest.raises((ConfigError, DataError), match=message):
        build_source(DataConfig(mixture=[entry]), 0)


def test_a_mixture_contradicts_what_belongs_to_its_parts():
    cfg = RunConfig()
    cfg.data.mixture = [{"task": "sudoku"}]
    check(cfg)
    cfg.verifier.name = "math"
    with pytest.raises(ConfigError, match="each part has its own verifier"):
        check(cfg)
    cfg.verifier.name, cfg.data.options = "", {"careless": 0.5}
    with pytest.raises(ConfigError, match="data.options and data.mixture"):
        check(cfg)
    cfg.data = DataConfig(task="records", train="a")
    with pytest.raises(ConfigError, match="data.task=records needs"):
        check(cfg)
    cfg.data = DataConfig(task="sudoku", train="a")
    with pytest.raises(ConfigError, match="data.task=jsonl or records"):
        check(cfg)


def test_settings_for_records_are_refused_for_procedural_tasks():
    with pytest.raises(ConfigError, match="data.curriculum=target: task sudoku makes its prompts up"):
        build_source(DataConfig(curriculum="target"), 0)


def test_a_mixture_can_be_written_on_the_command_line():
    from rlpipe import recipe

    cfg = recipe.load(["recipe=quickstart", "data.mixture=[{task: sudoku, weight: 2}, {task: countdown}]"])
    assert cfg.data.mixture == [{"task": "sudoku", "weight": 2}, {"task": "countdown"}]
    assert build_source(cfg.data, 0).schedule.shares == [2 / 3, 1 / 3]
    assert "mixture:" in recipe.to_yaml(cfg)
