"""Verifiers by name, with their options, and the one place where what they return is checked."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from rlpipe import user_code
from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.trajectory import Prompt

Verifier = Callable[[Prompt, str], float | dict[str, float]]
BUILT_IN = ("sudoku", "countdown", "reasoning_gym", "math", "exact", "format", "length", "code", "llm_judge", "reward_model")


def load_verifier(name: str, options: Mapping[str, Any] | None = None) -> Verifier:
    """A verifier by name, `module:function` or `path/to/file.py:function`, with its options filled in.

    Raises ConfigError with the nearest name, of the verifier or of the option, or for an option of another type.
    """
    if ":" in name:
        function = user_code.load("verifier.name", name, callable, "function")
    elif name in BUILT_IN:
        function = importlib.import_module(f"rlpipe.verifiers.{name}").verify
    else:
        near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"verifier.name={name} is not one of {', '.join(BUILT_IN)}; did you mean {near}? (or file.py:function)"
        )
    for option, value in (options or {}).items():
        known = options_of(function)
        if option in known and not _fits(value, known[option]):
            wanted = type(known[option]).__name__
            raise ConfigError(f"verifier.options.{option}={value!r}: verifier {name} takes {wanted} here")
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.0)
            hint = f"did you mean {near[0]}? ({', '.join(known)})" if near else "it has none"
            raise ConfigError(f"verifier.options.{option}: verifier {name} has no such option; {hint}")
    if options and dataclasses.is_dataclass(function):
        return dataclasses.replace(function, **options)
    return partial(function, **options) if options else function


def options_of(verifier: Verifier) -> dict[str, Any]:
    """A verifier's options and their defaults: keyword-only parameters, or the fields of one that is a dataclass instance."""
    if dataclasses.is_dataclass(verifier):
        fields = [field.name for field in dataclasses.fields(verifier) if not field.name.startswith("_")]
        return {name: getattr(verifier, name) for name in fields}
    try:
        parameters = inspect.signature(verifier).parameters
    except (TypeError, ValueError):  # a callable that does not say
        return {}
    return {name: parameter.default for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}


def _fits(value: Any, default: Any) -> bool:
    """Of the default's type, if it has a plain one; whole numbers are floats, too."""
    if type(default) not in (bool, int, float, str, dict, list):
        return True
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def hook(verifier: Verifier, name: str) -> Callable[..., Any] | None:
    """What a built-in verifier, or the module it is in, offers besides, or None.

    `prepare()` starts what takes long, `release()` ends it, `check(prompt)` raises DataError for an answer that it cannot read,
    `longest(prompt, **options)` is how many seconds a verdict can take before the verifier itself ends it. `judge_many(items)`
    gives the verdicts of many (prompt, response) at once, or the VerifierFailed of those that have none; `longest` then holds
    for all of them together.
    """
    function = verifier.func if isinstance(verifier, partial) else verifier
    module = getattr(function, "__module__", "")
    if not module.startswith("rlpipe.verifiers."):
        return None
    return getattr(function, name, None) or getattr(sys.modules[module], name, None)


def score(verifier: Verifier, prompt: Prompt, response: str) -> dict[str, float]:
    """The verdict as a dict with `reward`. Raises VerifierFailed if it is not made of finite numbers.

    What the verifier itself raises passes through: no failure becomes a number here.
    """
    return checked(verifier, prompt, verifier(prompt, response))


def checked(verifier: Verifier, prompt: Prompt, verdict: float | dict[str, float]) -> dict[str, float]:
    """What a verifier returned, as a dict. Raises VerifierFailed if it is not made of finite numbers, `reward` among them."""
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


def correctness(verdict: Mapping[str, float]) -> float:
    """What counts towards accuracy: `correct` where a verdict has it beside a shaped or weighted reward, else the reward."""
    return verdict.get("correct", verdict["reward"])


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def _name(verifier: Verifier) -> str:
    verifier = verifier.func if isinstance(verifier, partial) else verifier
    function = getattr(verifier, "__qualname__", None)
    return f"{verifier.__module__}:{function}" if function else repr(verifier)
