"""Tasks of the reasoning-gym library, judged by that library's own scorers."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import answers
from rlpipe.verifiers.harmless import is_formula, is_literal

log = logging.getLogger("rlpipe")

EVALUATED: dict[str, Callable[[str], bool]] = {  # library 0.1.25: scorers that run answers as Python; what they are given
    **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), is_literal),
    **dict.fromkeys(("countdown", "puzzle24", "polynomial_multiplication"), is_formula),
    **dict.fromkeys(("intermediate_integration", "simple_integration"), is_formula),
}
EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify|parse_latex)\((?!entry\b)")


@cache
def _dataset(name: str, options: str) -> Any:
    import reasoning_gym

    made = reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(options))
    if name not in EVALUATED and EVALUATES.search(inspect.getsource(type(made).score_answer)):
        raise DataError(f"the scorer of reasoning_gym:{name} runs answers as Python, and it is not known which are harmless")
    return made


@lru_cache(maxsize=256)
def _entry(literal: str) -> dict[str, Any]:
    return ast.literal_eval(literal)


def verify(prompt: Prompt, response: str, *, extract: str = "whole") -> dict[str, float]:
    """reward: the library's score, 1 for a right answer; many tasks give less than 1 for a near miss or for the right format.
    correct: whether it is 1.

    prompt.answer: {"dataset": name, "options": the task's options (some scorers read them), "entry": the library's
    entry, as an object or as the text of a Python literal}. extract: where the answer stands, see `answers.extract`.

    Some scorers run the answer as Python: they get the entry's own answer, literals or short formulas, and otherwise None. An
    answer that makes a scorer raise is wrong, unless the entry's own does so, too: then the exception passes through.
    """
    dataset, entry = _question(prompt)
    found = _score(dataset, answers.extract(response, extract), entry, EVALUATED.get(prompt.answer["dataset"]))
    return {"reward": found, "correct": float(found >= 1.0)}


def _score(dataset: Any, answer: str | None, entry: dict[str, Any], harmless: Callable[[str], bool] | None) -> float:
    if harmless and answer is not None and answer != entry["answer"] and not harmless(answer):
        answer = None
    try:
        return float(dataset.score_answer(answer=answer, entry=entry))
    except Exception as error:
        dataset.score_answer(answer=entry["answer"], entry=entry)
        log.info("reasoning_gym: an answer that the scorer cannot read is wrong (%s: %.100s)", type(error).__name__, error)
        return 0.0


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
