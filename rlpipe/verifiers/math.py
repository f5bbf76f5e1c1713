"""Mathematical equality by the math-verify library."""

from __future__ import annotations

from rlpipe.trajectory import Prompt


def verify(prompt: Prompt, response: str) -> float:
    """1 if the response's final answer (boxed, or the last expression) equals prompt.answer["answer"]; else 0.

    The library's own time-outs use signals, which do not work off the main thread; the pool's deadline stands in for them.
    """
    from math_verify import parse, verify

    gold = parse(f"${prompt.answer['answer']}$", parsing_timeout=None)
    answer = parse(response, parsing_timeout=None)
    return float(verify(gold, answer, timeout_seconds=None))
