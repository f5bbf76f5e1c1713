"""Countdown: an expression that uses each number exactly once and reaches the target."""

from __future__ import annotations

import ast
from fractions import Fraction

from rlpipe.trajectory import Prompt

MAX_LENGTH = 200  # characters; a longer response cannot be a sensible expression and parsing it could be made slow
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def verify(prompt: Prompt, response: str) -> float:
    """1 if the response is an expression of + - * / and brackets that uses the numbers and gives the target; else 0.

    Each number is used exactly once; there is no sign before a number.
    prompt.answer: {"numbers": list of int, "target": int}. Exact arithmetic, own parser, nothing is evaluated as code.
    """
    try:
        value, used = evaluate(response)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return float(value == prompt.answer["target"] and sorted(used) == sorted(prompt.answer["numbers"]))


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """(value, numbers used). Raises ValueError, SyntaxError or ZeroDivisionError for anything but plain arithmetic."""
    text = text.strip() if len(text) <= MAX_LENGTH else text
    if len(text) > MAX_LENGTH or not set(text) <= set("0123456789+-*/() "):
        raise ValueError("not an arithmetic expression")
    used: list[int] = []
    return _value(ast.parse(text, mode="eval").body, used), used


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("only + - * / over whole numbers")
