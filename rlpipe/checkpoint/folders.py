"""Checkpoints in a folder: `step_000020/` is complete, `step_000020.partial/` is being written and does not count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rlpipe.checkpoint.manifest import sync
from rlpipe.errors import CheckpointError

HOME = "checkpoints"
STATE = "driver.json"


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / HOME / name_of(step)


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def step_of(name: str) -> int | None:
    """20 of `step_000020`; None for other names, of unfinished ones too."""
    digits = name.removeprefix("step_")
    return int(digits) if name.startswith("step_") and digits.isdecimal() else None


def complete(run_dir: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first. Whether they are damaged is another question."""
    return complete_in(run_dir / HOME)


def complete_in(home: Path) -> list[Path]:
    found = [path.parent for path in home.glob(f"step_*/{STATE}") if step_of(path.parent.name) is not None]
    return sorted(found, key=lambda folder: step_of(folder.name))


def read_state(folder: Path) -> dict[str, Any]:
    """The driver's state in a checkpoint. Raises CheckpointError if it is damaged."""
    path = folder / STATE
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Remove {folder} to resume from the one before") from error


def begin(home: Path, step: int) -> Path:
    """An empty folder to write a step's checkpoint into; what earlier writes left unfinished goes. Raises OSError."""
    sweep(home)
    partial = home / f"{name_of(step)}.partial"
    partial.mkdir(parents=True)
    return partial


def sweep(home: Path) -> None:
    """Remove what counts for nothing: unfinished and replaced checkpoints."""
    for ending in ("partial", "replaced"):
        for left in home.glob(f"step_*.{ending}"):
            shutil.rmtree(left, ignore_errors=True)


def commit(partial: Path) -> Path:
    """Give a finished folder its name, in one step. One of that name makes room first. Raises OSError."""
    target = partial.with_suffix("")
    if target.exists():
        target.rename(target.with_suffix(".replaced"))
    partial.rename(target)
    sync(target.parent)
    return target


def rotate(home: Path, newest: int, keep: int) -> None:
    """Leave the `keep` newest up to step `newest`, which is complete. Later ones are of a future that did not happen: the run
    went back to one before them."""
    saved = complete_in(home)
    past = [folder for folder in saved if step_of(folder.name) <= newest]
    for folder in (*past[: -max(1, keep)], *saved[len(past) :]):
        shutil.rmtree(folder, ignore_errors=True)
    sweep(home)
