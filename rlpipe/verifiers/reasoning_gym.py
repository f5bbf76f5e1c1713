"""Tasks of the reasoning-gym library, judged by that library's own scorers."""

from __future__ import annotations

import ast
import json
from functools import cache, lru_cache
from typing import Any

from rlpipe.trajectory import Prompt


@cache
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(options))


@lru_cache(maxsize=256)
def _entry(literal: str) -> dict[str, Any]:
    return ast.literal_eval(literal)


def verify(prompt: Prompt, response: str) -> float:
    """The library's score, 1 for a right answer; many tasks give less than 1 for a near miss or for the right format.

    prompt.answer: {"dataset": name, "options": the task's options (some scorers read them), "entry": the library's
    entry, as an object or as the text of a Python literal}. The library is trusted to treat the response as data.
    """
    answer = prompt.answer
    entry = _entry(answer["entry"]) if isinstance(answer["entry"], str) else answer["entry"]
    dataset = _dataset(answer["dataset"], json.dumps(answer.get("options", {}), sort_keys=True))
    return float(dataset.score_answer(answer=response, entry=entry))
