"""Whether a checkpoint belongs to a run, and how its learner's part gets into this run's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError

PLAIN, UNIVERSAL, EXPORT = "plain", "universal", "export"


def way_to_load(saved: Mapping[str, int], now: Mapping[str, int]) -> str:
    """How ranks of shape `now` load what ranks of shape `saved` wrote; both {"workers", "zero_stage"}.

    plain: file by file, exactly. universal: through DeepSpeed's universal checkpoint, which holds the optimizer's state of each
    parameter by itself; also exact, and what ZeRO 1 and 2 read of each other. export: only the weights, with a fresh optimizer,
    which is what is left between the other stages, whose states are named and cut differently.
    """
    before, after = saved["zero_stage"], now["zero_stage"]
    if before == after and (saved["workers"] == now["workers"] or before == 0):
        return PLAIN
    return UNIVERSAL if before == after or {before, after} == {1, 2} else EXPORT


def shape(learner: Any) -> dict[str, int]:
    """Of a `LearnerConfig`: what the files of its ranks depend on."""
    return {"workers": learner.workers, "zero_stage": learner.zero_stage}


def said(saved: Mapping[str, int]) -> str:
    ranks = "1 rank" if saved["workers"] == 1 else f"{saved['workers']} ranks"
    return f"{ranks} at ZeRO {saved['zero_stage']}"


def check_fits(folder: Path, state: Mapping[str, Any], *, fingerprint: str, changes: list[str]) -> None:
    """Raises CheckpointError unless the checkpoint was written by this recipe.

    fingerprint: of this run's settings, with the checkpoint's number of ranks and ZeRO stage put in for its own, which may
    differ. changes: settings that differ from the run's own (key: old → new).
    """
    if state["fingerprint"] != fingerprint:
        listed = "\n  ".join(changes) or "(defaults of this version changed)"
        raise CheckpointError(
            f"{folder} belongs to another configuration:\n  {listed}\nUndo the change to resume, or start a new run from its "
            f"weights: model.path={folder / 'model'} resume=never"
        )
