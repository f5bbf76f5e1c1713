"""Answers in the data that no response could be compared with: found before anything starts, not in step 300."""

from __future__ import annotations

from functools import partial
from typing import Any

from rlpipe.config import VerifierConfig
from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.registry import BUILT_IN, hook
from rlpipe.verifiers.scorer import Scorer

CHECKED = 256  # training prompts, and as many held-out ones


def check_answers(source: Any, cfg: VerifierConfig, count: int = CHECKED) -> int:
    """How many prompts of a source were checked, its first `count` for training and as many held-out ones, by the verifiers
    that will judge the responses to them.

    Raises DataError for the first answer that its verifier cannot read, ConfigError as `Scorer` does and for an option whose
    value makes no sense. Only built-in verifiers have a check; a user's own is not asked.
    """
    scorer, tried = Scorer(cfg, source.verifier), set()
    size = count if source.size is None else min(count, source.size)
    prompts = [*(source.prompt(index) for index in range(size)), *source.test_prompts(count)]
    try:
        for prompt in prompts:
            for name in scorer.names(prompt):
                _check(prompt, name, scorer)
                if name not in tried and name in BUILT_IN and isinstance(scorer.verifier(name), partial):
                    scorer.verifier(name)(prompt, "")  # options are read when a response is judged
                tried.add(name)
    finally:
        scorer.release()
    return len(prompts)


def _check(prompt: Prompt, name: str, scorer: Scorer) -> None:
    check = hook(scorer.verifier(name), "check")
    try:
        if check is not None:
            check(prompt)
    except (DataError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        shown = str(prompt.answer)
        raise DataError(
            f"{prompt.uid}: verifier {name} cannot read the answer {shown[:200]}{'…' * (len(shown) > 200)}: "
            f"{reason}. Correct the record, or choose another verifier (verifier.name)"
        ) from error
