"""Countdown: an expression that uses each number exactly once and reaches the target."""

from __future__ import annotations

import ast
from fractions import Fraction

from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import answers

MAX_LENGTH = 200  # characters; a longer response cannot be a sensible expression and parsing it could be made slow
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
SIGNS = {"\\times": "*", "\\cdot": "*", "\\div": "/", "\\left": "", "\\right": "", "×": "*", "÷": "/", "−": "-"}


def verify(prompt: Prompt, response: str, *, extract: str = "whole", partial: float = 0.0) -> float | dict[str, float]:
    """1 if the answer is an expression of + - * / and brackets that uses the numbers and gives the target; else 0.

    Each number is used exactly once; there is no sign before a number and nothing behind an equals sign.
    prompt.answer: {"numbers": list of int, "target": int}. Exact arithmetic, own parser, nothing is evaluated as code.
    extract: where the answer stands, see `answers.extract`. partial: the reward for an answer that is there and wrong, 0.1 in
    the code of d1 (arXiv 2504.12216) and MDPO (arXiv 2508.13148), which read it from tags or a box; `correct` is then apart.
    """
    target, numbers = prompt.answer["target"], sorted(prompt.answer["numbers"])
    answer = response if extract == "whole" else answers.extract(response, extract) or ""
    try:
        value, used = evaluate(answer)
        correct = float(value == target and sorted(used) == numbers)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        correct = 0.0
    if not partial:
        return correct
    return {"reward": correct or (partial if answer.strip() else 0.0), "correct": correct}


def check(prompt: Prompt) -> None:
    """Raises DataError unless there are whole numbers to use and one to reach."""
    numbers, target = prompt.answer.get("numbers"), prompt.answer.get("target")
    if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in (*numbers, target)):
        raise DataError(f"numbers={numbers!r}, target={target!r}: a list of whole numbers and a whole number are needed")


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """(value, numbers used). Raises ValueError, SyntaxError or ZeroDivisionError for anything but plain arithmetic."""
    text = text.strip() if len(text) <= MAX_LENGTH else text
    for written, sign in SIGNS.items() if len(text) <= MAX_LENGTH else ():
        text = text.replace(written, sign)
    if len(text) > MAX_LENGTH or not set(text) <= set("0123456789+-*/() "):
        raise ValueError("not an arithmetic expression")
    used: list[int] = []
    return _value(ast.parse(text.strip(), mode="eval").body, used), used


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("only + - * / over whole numbers")
