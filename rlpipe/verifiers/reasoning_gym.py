"""Tasks of the reasoning-gym library, judged by that library's own scorers."""

from __future__ import annotations

import ast
import json
from functools import cache, lru_cache
from typing import Any

from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import answers


@cache
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(options))


@lru_cache(maxsize=256)
def _entry(literal: str) -> dict[str, Any]:
    return ast.literal_eval(literal)


def verify(prompt: Prompt, response: str, *, extract: str = "whole") -> dict[str, float]:
    """reward: the library's score, 1 for a right answer; many tasks give less than 1 for a near miss or for the right format.
    correct: whether it is 1.

    prompt.answer: {"dataset": name, "options": the task's options (some scorers read them), "entry": the library's
    entry, as an object or as the text of a Python literal}. extract: where the answer stands, see `answers.extract`. The
    library is trusted to treat the response as data.
    """
    dataset, entry = _question(prompt)
    found = float(dataset.score_answer(answer=answers.extract(response, extract), entry=entry))
    return {"reward": found, "correct": float(found >= 1.0)}


def check(prompt: Prompt) -> None:
    """Raises DataError for an entry or a task that cannot be read."""
    try:
        _question(prompt)
    except Exception as error:  # whatever the library or the literal raises
        raise DataError(f"{type(error).__name__}: {error}") from error


def _question(prompt: Prompt) -> tuple[Any, dict[str, Any]]:
    answer = prompt.answer
    entry = _entry(answer["entry"]) if isinstance(answer["entry"], str) else answer["entry"]
    return _dataset(answer["dataset"], json.dumps(answer.get("options", {}), sort_keys=True)), entry
