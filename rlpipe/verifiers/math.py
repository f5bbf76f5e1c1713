"""Mathematical equality by the math-verify library."""

from __future__ import annotations

import logging
import math
from typing import Any

from rlpipe.errors import VerifierFailed
from rlpipe.trajectory import Prompt

MAX_BITS = 2.0**16  # of a number that is worth computing; a short tower of powers has more than a machine can hold
FACTORIALS = {"factorial", "factorial2", "subfactorial", "gamma", "RisingFactorial", "FallingFactorial"}


def verify(prompt: Prompt, response: str) -> float:
    """1 if the response's final answer (boxed, or the last expression) equals prompt.answer["answer"]; else 0.

    A response without an answer, or with a number too large to be computed, is wrong. Raises VerifierFailed if the
    reference answer itself cannot be read. The library's own time-outs use signals, which do not work off the main
    thread, so they are off, and what still takes too long runs into the pool's deadline.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    reference = str(prompt.answer["answer"])
    gold = parse(reference if "$" in reference or "\\boxed" in reference else f"${reference}$", parsing_timeout=None)
    if not gold or not reference.strip():
        raise VerifierFailed(f"verifier math: the reference answer {reference!r} of {prompt.uid} cannot be read; correct it")
    answer = parse(response, parsing_timeout=None)
    if any(_bits(part) > MAX_BITS for part in answer):
        return 0.0
    return float(verify(gold, answer, timeout_seconds=None))


def _bits(node: Any) -> float:
    """Roughly how many bits the value of a sympy expression takes, without computing it; 0 for texts and symbols."""
    if getattr(node, "is_Rational", False):
        return float(max(int(node.p).bit_length(), int(node.q).bit_length()))
    if not getattr(node, "args", ()):
        return 0.0
    sizes = [_bits(part) for part in node.args]
    name = type(node).__name__
    if name == "Pow" and not node.args[1].free_symbols:
        return max(1.0, sizes[0]) * _power_of_two(sizes[1])
    if name in FACTORIALS:
        return sizes[0] * _power_of_two(sizes[0])
    return sum(sizes)


def _power_of_two(bits: float) -> float:
    return 2.0**bits if bits < 64 else math.inf
