"""Verifiers by name, and the one place where what they return is checked."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import sys
import zlib
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import ModuleType

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
    place, _, function = name.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's module raises while it is loaded
        raise ConfigError(f"verifier.name={name}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function, known, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"verifier.name={name}: {place} has no function {function}{hint}")
    return found


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"rlpipe_verifier_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


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
