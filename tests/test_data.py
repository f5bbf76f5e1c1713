"""Prompt sources: pure functions of seed and index, held-out sets that nothing leaks into, loud bad files."""

import json
import subprocess
import sys

import pytest

from rlpipe.config import DataConfig
from rlpipe.data.registry import build_source
from rlpipe.data.source import Cursor
from rlpipe.data.sudoku import careless, grids, solved
from rlpipe.errors import CheckpointError, ConfigError, DataError
from rlpipe.verifiers.registry import load_verifier, score

TASKS = ("sudoku", "countdown", "reasoning_gym:chain_sum")


def source(task: str, seed: int = 0, **options):
    return build_source(DataConfig(task=task, options=options), seed)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_functions_of_seed_and_index(task):
    one, again, other = source(task), source(task), source(task, seed=1)
    assert [one.prompt(i) for i in (3, 0, 7)] == [again.prompt(i) for i in (3, 0, 7)]
    assert [one.prompt(i).text for i in range(20)] != [other.prompt(i).text for i in range(20)]
    assert len({one.prompt(i).uid for i in range(50)}) == 50
    json.dumps(one.prompt(0).answer)
    assert set(one.prompt(5).text) | set(one.demonstration(5).demonstration) <= set(one.alphabet)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_prompts_are_the_same_for_all_seeds_and_never_trained_on(task):
    one, other = source(task), source(task, seed=9)
    held = one.test_prompts(64)
    assert held == other.test_prompts(64)
    texts = {prompt.text for prompt in held}
    for kind in (one.prompt, one.demonstration, other.prompt):
        assert not texts & {kind(i).text for i in range(300)}


@pytest.mark.parametrize("task", TASKS)
def test_demonstrations_are_right(task):
    made = source(task)
    verifier = load_verifier(made.verifier)
    for i in range(60):
        prompt = made.demonstration(i)
        assert score(verifier, prompt, prompt.demonstration)["reward"] == 1.0


@pytest.mark.parametrize("task", ("sudoku", "countdown"))
def test_careless_demonstrations_are_wrong_and_as_many_as_asked(task):
    made = source(task, careless=0.5)
    verifier = load_verifier(made.verifier)
    rewards = [score(verifier, p, p.demonstration)["reward"] for p in map(made.demonstration, range(400))]
    assert 0.4 < sum(rewards) / 400 < 0.6
    sloppy = source(task, careless=1.0)
    wrong = [score(verifier, p, p.demonstration)["reward"] for p in map(sloppy.demonstration, range(200))]
    assert sum(wrong) <= (0 if task == "sudoku" else 4)  # in Countdown every expression can happen to reach the target


def test_sudoku_grids_and_the_careless_solver():
    assert len(grids()) == len(set(grids())) == 288 and all(solved(grid) for grid in grids())
    assert careless("1__4____________") == "1234" * 4
    assert all(5 <= 16 - source("sudoku").prompt(i).text.count("_") <= 8 for i in range(50))


def test_processes_agree_whatever_their_hash_seed():
    code = "from rlpipe.config import *; from rlpipe.data.registry import *; print(build_source(DataConfig(), 4).prompt(11))"
    out = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": h}, capture_output=True, text=True, check=True
        ).stdout
        for h in ("1", "2")
    }
    assert len(out) == 1


def test_data_and_verifiers_import_no_torch():
    code = (
        "import sys, rlpipe.data.registry, rlpipe.verifiers.worker; from rlpipe.config import DataConfig;"
        "rlpipe.data.registry.build_source(DataConfig(task='reasoning_gym:chain_sum'), 0).prompt(0);"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_the_cursor_continues_where_it_was():
    cursor = Cursor(source("sudoku"))
    cursor.take(5)
    state = json.loads(json.dumps(cursor.state()))
    following = cursor.take(3)
    fresh = Cursor(source("sudoku"))
    fresh.restore(state)
    assert fresh.take(3) == following
    with pytest.raises(CheckpointError, match="countdown.*sudoku|sudoku.*countdown"):
        Cursor(source("countdown")).restore(state)


def test_templates_wrap_the_text_and_widen_the_alphabet():
    made = build_source(DataConfig(template="solve {prompt}:"), 0)
    assert made.prompt(0).text == f"solve {source('sudoku').prompt(0).text}:"
    assert set("solve :") <= set(made.alphabet)
    with pytest.raises(ConfigError, match="prompt"):
        build_source(DataConfig(template="solve"), 0)


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("sudokku", {}, "did you mean sudoku"),
        ("sudoku", {"carless": 1}, "did you mean careless"),
        ("countdown", {"numbers": 1}, "2 to 6"),
        ("reasoning_gym:chainsum", {}, "did you mean chain_sum"),
        ("reasoning_gym:chain_sum", {"no_such": 1}, "do not fit"),
    ],
)
def test_unknown_tasks_and_options_are_refused(task, options, message):
    with pytest.raises(ConfigError, match=message):
        source(task, **options)


def jsonl(tmp_path, *lines: str):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    return build_source(DataConfig(task="jsonl", train=str(path), test=str(path)), 0)


def test_jsonl_passes_have_fresh_orders_and_unique_uids(tmp_path):
    rows = [json.dumps({"question": f"q{i}", "ground_truth_answer": str(i), "demonstration": "d"}) for i in range(10)]
    made = jsonl(tmp_path, *rows, "")
    first, second = ([made.prompt(p * 10 + i).text for i in range(10)] for p in (0, 1))
    assert sorted(first) == sorted(second) == sorted(f"q{i}" for i in range(10)) and first != second
    assert made.prompt(3) == made.prompt(3) and len({made.prompt(i).uid for i in range(40)}) == 40
    assert made.prompt(0).answer == {"answer": made.prompt(0).text[1:]} and made.demonstration(0).demonstration == "d"
    assert [p.text for p in made.test_prompts(2)] == ["q0", "q1"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "answer": 1', r"d.jsonl:2: not JSON"),
        ('["a"]', "d.jsonl:2: a list"),
        ('{"answer": 1}', "d.jsonl:2: no field 'prompt'"),
        ('{"prompt": "a"}', "d.jsonl:2: no field 'answer'"),
        ('{"prompt": "", "answer": 1}', "d.jsonl:2: field 'prompt' must be"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        jsonl(tmp_path, '{"prompt": "a", "answer": 1}', line)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no records"):
        jsonl(tmp_path, "", "")
    with pytest.raises(DataError, match="no such file"):
        build_source(DataConfig(task="jsonl", train="nowhere.jsonl", test="nowhere.jsonl"), 0)
    made = jsonl(tmp_path, '{"prompt": "a", "answer": 1}')
    with pytest.raises(DataError, match="demonstration"):
        made.demonstration(0)
