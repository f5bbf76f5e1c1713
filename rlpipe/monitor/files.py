"""Writing into a run folder: what replaces a file does so in one step, and what cannot be written says why."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError (full disk, no permission) into a CheckpointError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror or error}. Free some space there, or choose another "
            "output_dir=, then run the same command with resume=auto"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically: readers see the old text or the new, also after a crash. Raises CheckpointError."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            with partial.open("w", encoding="utf8", errors="backslashreplace", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by `value` as strict JSON (see `jsonable`). Raises CheckpointError."""
    write_text(path, json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add one line and wait until it is on the disk. Raises CheckpointError."""
    with writing(path), path.open("ab") as file:
        file.write(line.encode("utf8", errors="backslashreplace") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def jsonable(value: Any) -> Any:
    """`value` with numpy scalars and arrays as plain numbers and lists, and non-finite floats (not JSON) as None."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # numpy; known by its method, so that numpy need not be imported
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
