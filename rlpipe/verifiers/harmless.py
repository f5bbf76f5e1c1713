"""Which answers may be handed to a scorer that evaluates them as Python: literals, and short formulas. Nothing is run here."""

from __future__ import annotations

import ast
import re

LONGEST = 1_000  # characters of a formula
MAX_COST = 400.0  # see `_cost`; the library's own answers have 250 at most
MAX_EXPONENT = 5.0  # bits
FUNCTIONS = set("exp log ln sqrt sin cos tan sec csc cot asin acos atan sinh cosh tanh asinh acosh atanh Abs Rational".split())
SIGNS = (ast.UAdd, ast.USub)
OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
EXPONENT = re.compile(r"[\d.][eE]")  # 1e999999 is short, and long to compute


def is_literal(text: str) -> bool:
    """Whether `eval` gives plain data for a text, without calling or looking up anything, or refuses it."""
    try:
        ast.literal_eval(text)
    except SyntaxError:
        return True  # to `eval`, too
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def is_formula(text: str) -> bool:
    """Whether a text is arithmetic over numbers, letters and a few functions, and its value of a size that can be computed."""
    if len(text) > LONGEST or EXPONENT.search(text):
        return False
    try:
        return _cost(ast.parse(text.strip(), mode="eval").body) <= MAX_COST
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _cost(node: ast.expr) -> float:
    """Roughly the bits of a number, the terms and degree of a formula. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return max(1.0, float(int(abs(node.value)).bit_length()))
    if isinstance(node, ast.Name) and not node.id.startswith("_"):
        return 1.0
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, SIGNS):
        return _cost(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, OPERATORS):
        left, right = _cost(node.left), _cost(node.right)
        if isinstance(node.op, ast.Pow):
            return left * 2.0**right if right <= MAX_EXPONENT else float("inf")
        return left + right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords:
        return 1.0 + sum(map(_cost, node.args))
    raise ValueError("no formula")
