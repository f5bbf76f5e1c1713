"""`latest` beside the runs of a recipe: a link to the newest, or a text file with its name where links do not exist."""

from __future__ import annotations

import os
from pathlib import Path

from rlpipe.errors import CheckpointError
from rlpipe.monitor.files import write_text

NAME = "latest"


def point_latest(home: Path, run_dir: Path) -> None:
    """Make `home/latest` name `run_dir`, in one step.

    Raises CheckpointError if a folder is in the way or the disk is full.
    """
    link = home / NAME
    if link.is_dir() and not link.is_symlink():
        raise CheckpointError(f"{link} is a folder, but that name is kept for a link to the newest run; rename it")
    home.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(run_dir.resolve(), home.resolve())
    temporary = home / f".{NAME}.partial"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target, target_is_directory=True)
        os.replace(temporary, link)
    except (OSError, NotImplementedError):
        temporary.unlink(missing_ok=True)
        write_text(link, target + "\n")  # a file system without links


def latest_run(home: Path) -> Path | None:
    """The run folder that `home/latest` names, resolved; None if there is none."""
    link = home / NAME
    if link.is_file():
        link = home / link.read_text(encoding="utf8").strip()
    return link.resolve() if link.is_dir() else None
