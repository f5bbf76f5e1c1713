"""Writing files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError


def write_atomic(path: Path, text: str) -> None:
    """Replace a file by way of a temporary one beside it. Raises CheckpointError if the disk refuses."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with partial.open("w", encoding="utf8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written: {error}. Free some space; checkpoints are untouched") from error


def append_line(path: Path, line: str) -> None:
    """Add a line and make sure it is on disk. Raises CheckpointError if the disk refuses."""
    try:
        with path.open("a", encoding="utf8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}. Free some space and resume with resume=auto") from error


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of a JSONL file whose `step` is later, and a last line that was cut off by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            kept.append(line)
    write_atomic(path, "".join(f"{line}\n" for line in kept))


def jsonable(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN or infinity: they become null."""
    return {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}


def point_latest(run_dir: Path) -> None:
    """Make `latest`, beside the run's folder, point at it; a text file where links are not possible."""
    link = run_dir.parent / "latest"
    partial = run_dir.parent / f".latest.{os.getpid()}"
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(run_dir.name, target_is_directory=True)
        partial.replace(link)
    except OSError:
        partial.unlink(missing_ok=True)
        write_atomic(run_dir.parent / "latest.txt", run_dir.name)


def record_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
