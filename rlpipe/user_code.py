"""What a recipe names as `module:name` or `path/to/file.py:name`: a user's own verifier or method."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from rlpipe.errors import ConfigError


def load(key: str, name: str, fits: Callable[[Any], bool], kind: str) -> Any:
    """The object that setting `key` names. fits: whether an object can be meant; kind: what such a one is called. Raises
    ConfigError with the cause, or with the nearest name."""
    place, _, wanted = name.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's module raises while it is loaded
        raise ConfigError(f"{key}={name}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, wanted, None)
    if not fits(found):
        known = [name for name, value in vars(module).items() if fits(value) and not name.startswith("_")]
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={name}: {place} has no {kind} {wanted}{hint}")
    return found


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"rlpipe_user_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
