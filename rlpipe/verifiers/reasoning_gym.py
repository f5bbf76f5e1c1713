"""Tasks of the reasoning-gym library, judged by that library's own scorers."""

from __future__ import annotations

from functools import cache

from rlpipe.trajectory import Prompt


@cache
def _dataset(name: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)


def verify(prompt: Prompt, response: str) -> float:
    """The library's score in [0, 1]. prompt.answer: {"dataset": name, "entry": the library's entry}."""
    return float(_dataset(prompt.answer["dataset"]).score_answer(answer=response, entry=prompt.answer["entry"]))
