"""Verifiers by name, and the one place where what they return is checked."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable
from numbers import Real

from rlpipe import user_code
from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.trajectory import Prompt

Verifier = Callable[[Prompt, str], float | dict[str, float]]
BUILT_IN = ("sudoku", "countdown", "reasoning_gym", "math", "exact")


def load_verifier(name: str) -> Verifier:
    """A verifier by name, `module:function` or `path/to/file.py:function`. Raises ConfigError with the nearest name."""
    if ":" not in name:
        if name not in BUILT_IN:
            near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"verifier.name={name} is not one of {', '.join(BUILT_IN)}; did you mean {near}? (or file.py:function)"
            )
        return importlib.import_module(f"rlpipe.verifiers.{name}").verify
    return user_code.load("verifier.name", name, callable, "function")


def score(verifier: Verifier, prompt: Prompt, response: str) -> dict[str, float]:
    """The verdict as a dict with `reward`. Raises VerifierFailed if it is not made of finite numbers.

    What the verifier itself raises passes through: no failure becomes a number here.
    """
    verdict = verifier(prompt, response)
    parts = verdict if isinstance(verdict, dict) else {"reward": verdict}
    if "reward" not in parts:
        raise VerifierFailed(f"verifier {_name(verifier)} returned {parts!r} for {prompt.uid}: no 'reward' in it")
    for name, value in parts.items():
        if not isinstance(name, str) or not _is_finite(value):
            raise VerifierFailed(
                f"verifier {_name(verifier)} returned {name}={value!r} for {prompt.uid}: not a finite number; return a "
                "float, or a dict of texts to floats"
            )
    return {name: float(value) for name, value in parts.items()}


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def _name(verifier: Verifier) -> str:
    function = getattr(verifier, "__qualname__", None)
    return f"{verifier.__module__}:{function}" if function else repr(verifier)
