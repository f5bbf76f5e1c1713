"""Verifiers by name, and the one place where what they return is checked."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.trajectory import Prompt

Verifier = Callable[[Prompt, str], float | dict[str, float]]
BUILT_IN = ("sudoku", "countdown", "reasoning_gym", "math", "exact")


def load_verifier(name: str) -> Verifier:
    """A verifier by name, as `module:function` or as `path/to/file.py:function`. Raises ConfigError with the nearest name."""
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
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(f"verifier.name={name}: {place} cannot be imported: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"verifier.name={name}: {place} has no function {function}")
    return getattr(module, function)


def _from_file(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def score(verifier: Verifier, prompt: Prompt, response: str) -> dict[str, float]:
    """The verdict as a dict with `reward`. Raises VerifierFailed if it is not made of finite numbers."""
    verdict = verifier(prompt, response)
    parts = verdict if isinstance(verdict, dict) else {"reward": verdict}
    if "reward" not in parts:
        raise VerifierFailed(f"the verifier returned {parts!r} for {prompt.uid}: no 'reward' in it")
    for name, value in parts.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise VerifierFailed(f"the verifier returned {name}={value!r} for {prompt.uid}: not a finite number")
    return {name: float(value) for name, value in parts.items()}
