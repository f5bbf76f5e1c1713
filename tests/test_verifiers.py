"""Scoring functions: right, wrong, hostile."""

import random
from pathlib import Path

import pytest

from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.trajectory import Prompt
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
        ("3*5+7", 1.0), ("7+(5*3)", 1.0), (" 3 * 5 + 7 ", 1.0), ("3*5+8", 0.0), ("22", 0.0), ("3*5+7+0", 0.0), ("3*7+1", 0.0),
        ("3*5+7*1", 0.0), ("(3*5+7", 0.0), ("3**5", 0.0), ("3//5", 0.0), ("7/0+3*5", 0.0), ("__import__('os')", 0.0), ("", 0.0),
        ("3*5+7" + " " * 500, 0.0), ("(" * 150, 0.0), ("0x3*5+7", 0.0), ("3_0", 0.0), ("3.0*5+7", 0.0),
    ],
)  # fmt: skip
def test_countdown(response, reward):
    assert verdict("countdown", {"numbers": [3, 5, 7], "target": 22}, response) == reward


def test_countdown_divides_exactly():
    assert verdict("countdown", {"numbers": [1, 3, 3], "target": 1}, "1/3*3") == 1.0


def test_countdown_survives_anything():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("0123456789+-*/() _.,aé\n\x00") for _ in range(rng.randint(0, 40)))
        assert verdict("countdown", {"numbers": [1, 2], "target": 3}, text) in (0.0, 1.0)


def test_exact_and_reasoning_gym():
    assert verdict("exact", {"answer": "42"}, " 42\n") == 1.0 and verdict("exact", {"answer": "42"}, "4 2") == 0.0
    entry = {"question": "1 + 1 =", "answer": "2", "metadata": {}}
    assert verdict("reasoning_gym", {"dataset": "chain_sum", "entry": entry}, "2") == 1.0
    assert verdict("reasoning_gym", {"dataset": "chain_sum", "entry": entry}, "3") < 1.0


@pytest.mark.parametrize(
    "answer, response, reward",
    [("1/2", r"so \boxed{0.5}", 1.0), ("1/2", r"\boxed{\frac{1}{2}}", 1.0), ("5", r"\boxed{6}", 0.0), ("5", "no idea", 0.0)],
)
def test_math(answer, response, reward):
    pytest.importorskip("math_verify")
    assert verdict("math", {"answer": answer}, response) == reward


def test_a_verifier_of_ones_own():
    verifier = load_verifier(f"{Path(__file__).parent / 'clue_verifier.py'}:share")
    parts = score(verifier, Prompt(uid="u", task="t", text="1_3_"), "12x4")
    assert parts == {"reward": 0.5, "digits": 0.75}
    assert load_verifier("rlpipe.verifiers.exact:verify") is load_verifier("exact")


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


@pytest.mark.parametrize("value", (float("nan"), float("inf"), None, "1", {"score": 1.0}, {"reward": 1.0, "x": "y"}))
def test_a_verdict_that_is_not_numbers_is_a_failure_and_not_a_zero(value):
    with pytest.raises(VerifierFailed, match="u"):
        score(lambda prompt, response: value, Prompt(uid="u", task="t", text=""), "")


def test_all_built_in_names_load():
    assert all(callable(load_verifier(name)) for name in BUILT_IN if name != "math")
