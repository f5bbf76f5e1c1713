"""Prompt sources: pure functions of seed and index, held-out sets that nothing leaks into, loud bad files."""

import dataclasses
import json
import random
import subprocess
import sys

import pytest

from rlpipe.config import DataConfig
from rlpipe.data.registry import build_source
from rlpipe.data.source import Cursor
from rlpipe.data.sudoku import careless, grids, solutions, solved
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
    assert sum(wrong) == 0


def test_held_out_prompts_differ_and_a_longer_list_begins_with_the_shorter():
    for task in TASKS:
        held = source(task).test_prompts(60)
        assert len({prompt.text for prompt in held}) == len({prompt.uid for prompt in held}) == 60
        assert source(task).test_prompts(20) == held[:20] and source(task).test_prompts(0) == []
    few = source("countdown", numbers=2, max_number=9, operations="+").test_prompts(500)
    assert 0 < len(few) < 45  # there are 45 puzzles in all


def test_options_without_puzzles_end_in_an_error():
    made = source("countdown", numbers=3, max_number=2, operations="*")  # four puzzles, none of them held out
    assert made.prompt(0).text in ("1 1 1=1", "1 1 2=2", "1 2 2=4", "2 2 2=8")
    with pytest.raises(ConfigError, match="no held-out puzzle.*max_number"):
        made.test_prompts(1)


def test_sudoku_clues_and_unique_solutions():
    assert solutions("_" * 16) == 288 and solutions("1234341221434321") == 1
    made = source("sudoku", clues_low=4, clues_high=6, unique=True)
    for prompt in (*map(made.prompt, range(20)), *made.test_prompts(20)):
        assert solutions(prompt.text) == 1 and 4 <= 16 - prompt.text.count("_") <= 6
    assert any(solutions(source("sudoku").prompt(i).text) > 1 for i in range(20))


def test_responses_are_as_long_as_promised():
    rng = random.Random(1)
    for _ in range(40):
        options = {"numbers": rng.randint(2, 6), "max_number": rng.choice((5, 9, 20, 150)), "careless": 0.5}
        made = source("countdown", rng.randrange(1000), operations=rng.choice(("+-*", "+-", "*+")), **options)
        for prompt in map(made.demonstration, range(5)):
            assert len(prompt.demonstration) <= made.max_response_chars
            assert len(prompt.answer["numbers"]) == options["numbers"]
    assert source("sudoku").max_response_chars == 16
    assert source("reasoning_gym:chain_sum").max_response_chars is None


def test_procedural_prompts_fit_their_alphabet_for_any_seed():
    rng = random.Random(2)
    for task in ("sudoku", "countdown"):
        for _ in range(100):
            made, index = source(task, rng.randrange(2**31), careless=0.5), rng.randrange(10**9)
            prompt = made.demonstration(index)
            assert set(prompt.text) | set(prompt.demonstration) <= set(made.alphabet)
            assert made.alphabet == "".join(sorted(set(made.alphabet)))


def test_neighbouring_seeds_of_the_library_share_no_entries():
    texts = [{source("reasoning_gym:chain_sum", seed).prompt(i).text for i in range(50)} for seed in (0, 1)]
    assert len(texts[0] & texts[1]) < 5


@pytest.mark.parametrize("name", ["acre", "arc_1d", "knights_knaves", "rearc", "word_ladder"])
def test_entries_of_the_library_reach_its_scorer_unharmed(name):
    """Tuples, numpy scalars, integer keys, and tasks that prepare all entries of a data set at once."""
    made = source(f"reasoning_gym:{name}")
    for i in (0, 3, 700):
        prompt = made.demonstration(i)
        prompt = dataclasses.replace(prompt, answer=json.loads(json.dumps(prompt.answer)))
        assert score(load_verifier("reasoning_gym"), prompt, prompt.demonstration)["reward"] == 1.0


def test_options_reach_the_library_and_its_scorer():
    made = source("reasoning_gym:chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    assert made.prompt(0).answer["options"]["max_terms"] == 2 and len(made.prompt(0).text.split(":")[1]) < 12


def test_library_tasks_without_answers_have_no_demonstrations():
    with pytest.raises(DataError, match="warm_start.steps=0"):
        source("reasoning_gym:graph_color").demonstration(0)


def test_sudoku_grids_and_the_careless_solver():
    assert len(grids()) == len(set(grids())) == 288 and all(solved(grid) for grid in grids())
    assert careless("1__4____________") == "1234" * 4
    assert all(5 <= 16 - source("sudoku").prompt(i).text.count("_") <= 8 for i in range(50))


def test_processes_agree_whatever_their_hash_seed():
    code = (
        "from rlpipe.config import *; from rlpipe.data.registry import *;"
        "tasks = ('sudoku', 'countdown', 'reasoning_gym:gcd');"
        "print([build_source(DataConfig(task=task), 4).demonstration(11) for task in tasks])"
    )
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


def test_the_cursor_refuses_other_sources_and_damaged_states(tmp_path):
    cursor = Cursor(source("sudoku"))
    cursor.take(3)
    cursor.drop(2)
    state = cursor.state()
    fresh = Cursor(source("sudoku", careless=0.5))  # demonstrations are no business of the cursor
    fresh.restore(state)
    assert (fresh.index, fresh.dropped) == (3, 2)
    for other in (source("sudoku", seed=1), source("sudoku", clues_low=6)):
        with pytest.raises(CheckpointError, match="resume=never"):
            Cursor(other).restore(state)
    for damage in ({"index": -1}, {"index": "3"}, {"dropped": None}):
        with pytest.raises(CheckpointError, match="damaged"):
            fresh.restore(state | damage)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = (jsonl(tmp_path / k, f'{{"prompt": "{k}", "answer": "1"}}') for k in "ab")
    with pytest.raises(CheckpointError, match="jsonl"):
        Cursor(two).restore(Cursor(one).state())


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
        ("countdown", {"operations": "+/"}, "operations"),
        ("countdown", {"operations": "+", "careless": 0.5}, "every expression"),
        ("countdown", {"max_number": "9"}, "whole number"),
        ("sudoku", {"clues_low": 8, "clues_high": 5}, "clues_high=5"),
        ("sudoku", {"clues_low": 0}, "clues_low=0"),
        ("sudoku", {"clues_low": 3, "unique": True}, "clues_low=3"),
        ("sudoku", {"clues_high": 15}, "clues_high=15"),
        ("sudoku", {"unique": "yes"}, "true or false"),
        ("sudoku", {"careless": 1.5}, "0 to 1"),
        ("sudoku", {"careless": "all"}, "0 to 1"),
        ("jsonl", {"careless": 1}, "no such option; did you mean answer"),
        ("reasoning_gym:chainsum", {}, "did you mean chain_sum"),
        ("reasoning_gym:chain_sum", {"no_such": 1}, "do not fit"),
        ("reasoning_gym:chain_sum", {"min_digit": 1}, "did you mean min_digits"),
        ("reasoning_gym:chain_sum", {"size": 1}, "no option size"),
        ("reasoning_gym:chain_sum", {"min_digits": 9, "max_digits": 1}, "do not fit"),
    ],
)
def test_unknown_tasks_and_options_are_refused(task, options, message):
    with pytest.raises(ConfigError, match=message):
        source(task, **options)


def jsonl(tmp_path, *lines: str, test: tuple[str, ...] = ('{"prompt": "held out", "answer": "0"}',), seed: int = 0):
    path, held = tmp_path / "d.jsonl", tmp_path / "test.jsonl"
    path.write_text("\n".join(lines), encoding="utf8")
    held.write_text("\n".join(test), encoding="utf8")
    return build_source(DataConfig(task="jsonl", train=str(path), test=str(held)), seed)


def test_jsonl_passes_have_fresh_orders_and_unique_uids(tmp_path):
    rows = [json.dumps({"question": f"q{i}", "ground_truth_answer": str(i), "demonstration": "d"}) for i in range(10)]
    made = jsonl(tmp_path, *rows, "", test=tuple(row.replace(': "q', ': "h') for row in rows))
    first, second = ([made.prompt(p * 10 + i).text for i in range(10)] for p in (0, 1))
    assert sorted(first) == sorted(second) == sorted(f"q{i}" for i in range(10)) and first != second
    assert made.prompt(3) == made.prompt(3) and len({made.prompt(i).uid for i in range(40)}) == 40
    assert made.prompt(0).answer == {"answer": made.prompt(0).text[1:]} and made.demonstration(0).demonstration == "d"
    assert [p.text for p in made.test_prompts(2)] == ["h0", "h1"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "answer": 1', r"d.jsonl:2: not JSON"),
        ('["a"]', "d.jsonl:2: a list"),
        ('{"answer": 1}', "d.jsonl:2: no field 'prompt'"),
        ('{"prompt": "a"}', "d.jsonl:2: no field 'answer'"),
        ('{"prompt": "", "answer": 1}', "d.jsonl:2: field 'prompt' must be"),
        ('{"question": 3, "answer": 1}', "d.jsonl:2: field 'question' must be"),
        ('{"prompt": "b", "answer": null}', "d.jsonl:2: field 'answer' must be"),
        ('{"prompt": "b", "ground_truth_answer": [1]}', "d.jsonl:2: field 'ground_truth_answer' must be"),
        ('{"prompt": "b", "answer": 1, "demonstration": 2}', "d.jsonl:2: field 'demonstration' must be"),
        ('{"prompt": "b", "answer": 1, "uid": "1"}', "d.jsonl:2: uid '1' is already that of .*d.jsonl:1"),
        ("[" * 100_000, "d.jsonl:2: not usable JSON|d.jsonl:2: not JSON"),
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


def test_jsonl_names_alphabet_and_optional_fields(tmp_path):
    rows = (
        '{"question": "é", "answer": {"tests": [12]}, "uid": "mine", "task": "code"}',
        '\ufeff{"prompt": "b", "answer": 0.5}',
    )
    made = jsonl(tmp_path, rows[1], rows[0] + "\r", test=('{"prompt": "h", "answer": "z"}',) * 1)
    prompts = {prompt.uid: prompt for prompt in map(made.prompt, range(4))}
    assert set(prompts) == {"jsonl/0/mine", "jsonl/1/mine", "jsonl/0/1", "jsonl/1/1"}
    assert prompts["jsonl/0/mine"].task == "code" and prompts["jsonl/0/1"].answer == {"answer": 0.5}
    assert set("ébhz12[].05") == set(made.alphabet)


def test_jsonl_holds_out_what_the_test_file_has(tmp_path, caplog):
    rows = [f'{{"prompt": "p{i}", "answer": "{i}"}}' for i in range(5)]
    made = jsonl(tmp_path, *rows, test=(rows[1], rows[1], rows[4]))
    assert made.size == 3 and {made.prompt(i).text for i in range(9)} == {"p0", "p2", "p3"}
    assert [prompt.text for prompt in made.test_prompts(9)] == ["p1", "p4"]
    assert "3 of 5 records used, shape rlpipe; left out: 2 also in the test set" in caplog.text
    with pytest.raises(DataError, match="none is left"):
        jsonl(tmp_path, *rows, test=tuple(rows))


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="latin.jsonl:2: not UTF-8"):
        build_source(DataConfig(task="jsonl", train=str(path), test=str(path)), 0)
    with pytest.raises(DataError, match="data.test=: no such file; set data.test"):
        build_source(DataConfig(task="jsonl", train=str(jsonl_file(tmp_path)), test=""), 0)


def jsonl_file(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}', encoding="utf8")
    return path
