"""Run checkpoints: a folder that either is complete or does not count.

`checkpoints/step_000020/` holds the learner's part (DeepSpeed), a Hugging Face folder `model/` and `driver.json`. It is written
under a temporary name, synced and renamed, so an interrupted or failed write never shadows the last good one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError

STATE = "driver.json"


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def complete(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob(f"step_[0-9]*[0-9]/{STATE}"))


def write(run_dir: Path, step: int, state: dict[str, Any], save: Callable[[str], None], keep: int) -> Path:
    """Write one checkpoint: `save(folder)` makes the learner write its part, then the driver's `state` is added.

    Older ones beyond `keep` are removed afterwards. Raises CheckpointError; the temporary folder is then removed.
    """
    target = folder_of(run_dir, step)
    partial = target.with_name(f"{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(str(partial))
        (partial / STATE).write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf8")
        for path in partial.rglob("*"):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _sync(target.parent)
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {target}: {error}. Free some space and run the same "
            "command with resume=auto; the last complete checkpoint is untouched"
        ) from error
    for old in complete(run_dir)[: -max(1, keep)]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read_state(folder: Path) -> dict[str, Any]:
    """The driver's state in a checkpoint. Raises CheckpointError if it is damaged."""
    path = folder / STATE
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Remove {folder} to resume from the one before") from error


def check_fits(folder: Path, state: dict[str, Any], *, fingerprint: str, changes: list[str], learner: dict[str, int]) -> None:
    """Raises CheckpointError unless the checkpoint was written by this recipe and this shape of learner.

    changes: settings that differ from the run's own (key: old → new). learner: {"workers", "zero_stage"}.
    """
    if state["learner"] != learner:
        raise CheckpointError(
            f"{folder} was written by {state['learner']['workers']} learner ranks at ZeRO {state['learner']['zero_stage']}, "
            f"this run has {learner['workers']} at ZeRO {learner['zero_stage']}. Use the same numbers, or start a new run from "
            f"its weights: model.path={folder / 'model'} resume=never"
        )
    if state["fingerprint"] != fingerprint:
        listed = "\n  ".join(changes) or "(defaults of this version changed)"
        raise CheckpointError(
            f"{folder} belongs to another configuration:\n  {listed}\nUndo the change to resume, or start a new run from its "
            f"weights: model.path={folder / 'model'} resume=never"
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
