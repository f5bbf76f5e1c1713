"""Scoring functions: right, wrong, hostile."""

import inspect
import random
import threading
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from rlpipe.data.sudoku import grids, solved
from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.harmless import is_formula, is_literal
from rlpipe.verifiers.reasoning_gym import EVALUATED, EVALUATES
from rlpipe.verifiers.registry import BUILT_IN, load_verifier, score


def verdict(name: str, answer: dict, response: str) -> float:
    return score(load_verifier(name), Prompt(uid="u", task="t", text="", answer=answer), response)["reward"]


GRID = "1234341221434321"


@pytest.mark.parametrize(
    "clues, response, reward",
    [
        ("1_3_____________", GRID, 1.0),
        ("2_______________", GRID, 0.0),  # a clue was changed
        ("________________", "1234123412341234", 0.0),  # columns
        ("________________", "1234234134124123", 0.0),  # boxes
        ("________________", GRID[:-1], 0.0),
        ("________________", GRID + "1", 0.0),
        ("________________", "a" * 16, 0.0),
        ("________________", "", 0.0),
    ],
)
def test_sudoku(clues, response, reward):
    assert verdict("sudoku", {"clues": clues}, response) == reward


@pytest.mark.parametrize(
    "response, reward",
    [
        ("3*5+7", 1.0), ("7+(5*3)", 1.0), (" 3 * 5 + 7 ", 1.0), ("3*5+8", 0.0), ("22", 0.0), ("3*5+7+0", 0.0),
        ("3*7+1", 0.0), ("3*5+7*1", 0.0), ("(3*5+7", 0.0), ("3**5", 0.0), ("3//5", 0.0), ("7/0+3*5", 0.0),
        ("__import__('os')", 0.0), ("", 0.0), ("3*5+7" + " " * 500, 0.0), ("(" * 150, 0.0),
        ("0x3*5+7", 0.0), ("3_0", 0.0), ("3.0*5+7", 0.0),
        ("3*5+7\n", 1.0), ("-3*-5+7", 0.0), ("3*5+7=22", 0.0), ("3(5)+7", 0.0), ("03*5+7", 0.0), ("9**9**9", 0.0),
    ],
)  # fmt: skip
def test_countdown(response, reward):
    assert verdict("countdown", {"numbers": [3, 5, 7], "target": 22}, response) == reward


def test_countdown_divides_exactly():
    assert verdict("countdown", {"numbers": [1, 3, 3], "target": 1}, "1/3*3") == 1.0


def test_countdown_survives_anything():
    rng = random.Random(0)
    alphabets = "0123456789+-*/() _.,aé\n\x00", "12+-*/()", "(1", "9*", "-1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the parser of the language warns about odd literals
        for _ in range(4000):
            text = "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(0, 250)))
            assert verdict("countdown", {"numbers": [1, 2], "target": 3}, text) in (0.0, 1.0)


def test_countdown_agrees_with_exact_arithmetic():
    """Random trees over the numbers are right if and only if their value is the target and no number is missing."""
    rng = random.Random(1)
    for _ in range(500):
        numbers = [rng.randint(1, 20) for _ in range(rng.randint(2, 6))]
        parts = [(str(n), Fraction(n)) for n in rng.sample(numbers, len(numbers))]
        while len(parts) > 1:
            (a, x), (b, y) = parts.pop(rng.randrange(len(parts))), parts.pop(rng.randrange(len(parts)))
            sign = rng.choice("+-*/" if y else "+-*")
            parts.append((f"({a}{sign}{b})", {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else x}[sign]))
        text, value = parts[0]
        answer = {"numbers": sorted(numbers), "target": int(value)}
        assert verdict("countdown", answer, text) == float(value.denominator == 1)
        assert verdict("countdown", {**answer, "target": int(value) + 1}, text) == 0.0
        assert verdict("countdown", {**answer, "numbers": numbers[1:]}, text) == 0.0


def test_sudoku_accepts_the_solved_grids_and_nothing_else():
    rng = random.Random(2)
    for grid in grids():
        assert verdict("sudoku", {"clues": "_" * 16}, grid) == 1.0
    for _ in range(2000):
        cells = list(rng.choice(grids()))
        for _ in range(rng.randint(1, 3)):
            cells[rng.randrange(16)] = rng.choice("12345_ ١")
        assert verdict("sudoku", {"clues": "_" * 16}, "".join(cells)) == float(solved("".join(cells)))


@pytest.mark.parametrize("name, answer", [("sudoku", {"clues": "1_"}), ("sudoku", {}), ("countdown", {}), ("exact", {})])
def test_a_broken_question_is_a_failure_and_not_a_zero(name, answer):
    with pytest.raises((KeyError, ValueError)):
        verdict(name, answer, GRID if name == "sudoku" else "1+2")


def test_exact_and_reasoning_gym():
    assert verdict("exact", {"answer": "42"}, " 42\n") == 1.0 and verdict("exact", {"answer": "42"}, "4 2") == 0.0
    entry = {"question": "1 + 1 =", "answer": "2", "metadata": {}}
    assert verdict("reasoning_gym", {"dataset": "chain_sum", "entry": entry}, "2") == 1.0
    assert verdict("reasoning_gym", {"dataset": "chain_sum", "entry": entry}, "3") < 1.0


@pytest.mark.parametrize(
    "answer, response, reward",
    [
        ("1/2", r"so \boxed{0.5}", 1.0),
        ("1/2", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{\frac{1}{2}}", "the answer is 0.5", 1.0),
        (r"$\text{east}$", r"\boxed{\text{east}}", 1.0),
        ("(1,2)", r"\boxed{(1,2)}", 1.0),
        (4, r"\boxed{4}, not 5", 1.0),
        ("2^{100}", r"\boxed{2^{100}}", 1.0),
        ("5", r"\boxed{6}", 0.0),
        ("5", "no idea", 0.0),
        ("5", "", 0.0),
        ("5", r"\boxed{", 0.0),
        ("5", r"\boxed{9^{9^{9^9}}}", 0.0),  # computing any of these would never end
        ("5", r"\boxed{100000!!}", 0.0),
        ("5", r"\boxed{((10^9)!)!}", 0.0),
        ("5", "9**9**9**9", 0.0),
    ],
)
def test_math(answer, response, reward):
    pytest.importorskip("math_verify")
    assert verdict("math", {"answer": answer}, response) == reward


def test_math_works_off_the_main_thread_and_refuses_unreadable_references():
    pytest.importorskip("math_verify")
    found = []
    thread = threading.Thread(target=lambda: found.append(verdict("math", {"answer": "4"}, r"\boxed{4}")))
    thread.start()
    thread.join(60)
    assert found == [1.0]
    with pytest.raises(VerifierFailed, match="reference answer"):
        verdict("math", {"answer": " "}, r"\boxed{4}")


def test_reasoning_gym_takes_entries_as_objects_and_as_literals():
    entry = {"question": "q", "answer": "7", "metadata": {"pair": (1, 2)}}
    for form in (entry, repr(entry)):
        assert verdict("reasoning_gym", {"dataset": "chain_sum", "options": {"max_terms": 6}, "entry": form}, "7") == 1.0


def gym(name, response):
    """The verdict on a response to the library's first question of a kind, and the entry."""
    import reasoning_gym

    entry = reasoning_gym.create_dataset(name, size=1, seed=0)[0]
    response = response(entry) if callable(response) else response
    return verdict("reasoning_gym", {"dataset": name, "entry": repr({key: entry[key] for key in entry})}, response)


@pytest.mark.parametrize("name", sorted(EVALUATED))
def test_nothing_in_an_answer_is_run(name, tmp_path):
    for call in (f"__import__('os').mkdir({str(tmp_path / 'x')!r})", f"[open({str(tmp_path / 'x')!r}, 'w')]"):
        assert gym(name, call) < 0.1
    assert list(tmp_path.iterdir()) == []
    assert gym(name, lambda entry: entry["answer"]) == 1.0
    assert gym(name, "9**9**9**9") < 0.1 and gym(name, "1e999999") < 0.1


def test_names_of_a_scorer_s_own_are_not_looked_up():
    assert gym("string_insertion", "oracle_answer") == 0.0
    assert gym("string_insertion", lambda entry: repr(list(entry["answer"]))) == 0.1
    assert gym("simple_integration", lambda entry: "Integral({integrand}, {variable}) + C".format(**entry["metadata"])) == 0.0


def test_scorers_that_run_answers_are_known():
    from reasoning_gym.factory import DATASETS

    found = {name for name, (kind, _) in DATASETS.items() if EVALUATES.search(inspect.getsource(kind.score_answer))}
    assert found == set(EVALUATED)


def test_an_answer_that_a_scorer_cannot_read_is_wrong():
    assert gym("prime_factorization", "I do not know") == 0.0 and gym("game_of_life", "{}") == 0.0
    entry = {"question": "q", "answer": "x", "metadata": {}}
    with pytest.raises(ValueError, match="'x'"):
        verdict("reasoning_gym", {"dataset": "prime_factorization", "entry": entry}, "y")


@pytest.mark.parametrize("text, harmless", [("x**2/2 + C", 1), ("-3*sin(4*x - 6)**4/4 + C", 1), ("9**99", 0), ("f(x)", 0)])
def test_formulas(text, harmless):
    assert is_formula(text) == harmless


@pytest.mark.parametrize(
    "text", ["x.y", "x[0]", "'a'", "_x", "[1]", "lambda: 1", "5!", "x if x else y", "(" * 999, "1e9", "9" * 999, ""]
)
def test_what_is_no_formula(text):
    assert not is_formula(text)


@pytest.mark.parametrize(
    "text, harmless", [("[1, [2]]", 1), ("1 2", 1), ("x", 0), ("f()", 0), ("[0] * 9**9", 0), ("'%9d' % 1", 0)]
)
def test_literals(text, harmless):
    assert is_literal(text) == harmless


def test_a_verifier_of_ones_own():
    verifier = load_verifier(f"{Path(__file__).parent / 'clue_verifier.py'}:share")
    parts = score(verifier, Prompt(uid="u", task="t", text="1_3_"), "12x4")
    assert parts == {"reward": 0.5, "digits": 0.75}
    assert load_verifier("rlpipe.verifiers.exact:verify") is load_verifier("exact")


OWN = '''
from __future__ import annotations
from dataclasses import dataclass
from rlpipe.trajectory import Prompt

@dataclass
class Verdict:
    length: int

def short(prompt: Prompt, response: str) -> float:
    """Shorter is better."""
    return 1 / (1 + Verdict(len(response)).length)
'''


def test_a_verifier_of_ones_own_takes_under_twenty_lines(tmp_path):
    for text in (OWN, (Path(__file__).parent / "clue_verifier.py").read_text(encoding="utf8")):
        assert len(text.splitlines()) < 20
    path = tmp_path / "mine.py"
    path.write_text(OWN, encoding="utf8")
    assert score(load_verifier(f"{path}:short"), Prompt(uid="u", task="t", text=""), "abc") == {"reward": 0.25}
    with pytest.raises(ConfigError, match="no function shrot; did you mean short"):
        load_verifier(f"{path}:shrot")
    for broken, cause in (("def f(:", "SyntaxError"), ("x = missing", "NameError"), ("1/0", "ZeroDivisionError")):
        path.write_text(broken, encoding="utf8")
        with pytest.raises(ConfigError, match=f"mine.py cannot be imported: {cause}"):
            load_verifier(f"{path}:f")


@pytest.mark.parametrize(
    "name, message",
    [
        ("sudoko", "did you mean sudoku"),
        ("nowhere.py:f", "no file"),
        ("json:nothing", "no function"),
        ("no.module:f", "imported"),
    ],
)
def test_unknown_verifiers_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        load_verifier(name)


@pytest.mark.parametrize(
    "value",
    (
        float("nan"),
        float("inf"),
        None,
        "1",
        {"score": 1.0},
        {"reward": 1.0, "x": "y"},
        {"reward": 1, 2: 3},
        10**400,
        [1],
    ),
)
def test_a_verdict_that_is_not_numbers_is_a_failure_and_not_a_zero(value):
    def odd(prompt, response):
        return value

    with pytest.raises(VerifierFailed, match="odd.* for task/7"):
        score(odd, Prompt(uid="task/7", task="t", text=""), "")


def test_numbers_of_all_kinds_are_floats_in_the_end():
    prompt = Prompt(uid="u", task="t", text="")
    for value in (True, 1, np.float32(1), np.int64(1), Fraction(1), {"reward": 1}):
        (reward,) = score(lambda p, r, value=value: value, prompt, "").values()
        assert type(reward) is float and reward == 1.0


def test_what_a_verifier_raises_passes_through():
    with pytest.raises(ZeroDivisionError):
        score(lambda prompt, response: 1 / 0, Prompt(uid="u", task="t", text=""), "")


def test_all_built_in_names_load():
    assert all(callable(load_verifier(name)) for name in BUILT_IN if name != "math")
