"""The answer, word for word."""

from __future__ import annotations

from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import answers


def verify(prompt: Prompt, response: str, *, extract: str = "whole") -> float:
    """1 if the response's answer, read as `answers.extract` says, is prompt.answer["answer"] but for white space around it."""
    return float(str(prompt.answer["answer"]).strip() == answers.extract(response, extract))


def check(prompt: Prompt) -> None:
    """Raises DataError for a reference that no answer can equal."""
    if not str(prompt.answer.get("answer", "")).strip():
        raise DataError("no text under 'answer'")
