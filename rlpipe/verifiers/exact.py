"""The answer, word for word."""

from __future__ import annotations

from rlpipe.trajectory import Prompt


def verify(prompt: Prompt, response: str) -> float:
    """1 if the response equals prompt.answer["answer"], surrounding white space aside; else 0."""
    return float(response.strip() == str(prompt.answer["answer"]).strip())
