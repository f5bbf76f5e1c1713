"""Majority voting over responses to one prompt: of several seeds, or of several block lengths (HEX)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def answer_of(text: str) -> str:
    """What a response votes for: the content of its last \\boxed{…}, or else its text, without white space; none is no vote."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                text = text[start + len("\\boxed{") : end]
                break
    return "".join(text.split())


def majority(texts: Sequence[str]) -> int:
    """Index of the first response with the most frequent answer; among equals the answer that came first wins. Responses
    without an answer do not vote; if none has one it is 0. Raises ValueError for no responses."""
    if not texts:
        raise ValueError("nobody to vote")
    answers = [answer_of(text) for text in texts]
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0
    return answers.index(max(votes, key=votes.get))  # a Counter keeps the order in which answers came
