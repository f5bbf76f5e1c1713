"""The list of a checkpoint's files, with sizes and digests, written last: by it a checkpoint is known to be whole."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError

NAME = "complete.json"
CACHES = ("universal",)  # folders of a checkpoint that can be made again from the rest of it
Record = dict[str, Any]  # {"size": bytes, "sha256": 64 hexadecimal digits}


@dataclass(frozen=True, slots=True)
class Part:
    """What one process wrote into a checkpoint. rank: who it is, for messages · node: its address · files: path relative to
    the checkpoint → its record."""

    rank: str
    node: str
    files: Mapping[str, Record]


def record(path: Path) -> Record:
    """Size and SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def gather(folder: Path, parts: Sequence[Part]) -> dict[str, Record]:
    """Records of all files in the folder; those of `parts` as their writers had them.

    Raises CheckpointError if a file that a process wrote is not here, or not with that size: it wrote to a disk of its own.
    """
    files: dict[str, Record] = {}
    for part in parts:
        for name, known in part.files.items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != known["size"]:
                found = "is not there" if size is None else f"has {size} bytes"
                raise CheckpointError(
                    f"{part.rank} on node {part.node} wrote {known['size']} bytes to {path}, but here that file {found}: "
                    f"{SHARED}"
                )
        files |= part.files
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files:
            sync(path)
            files[name] = record(path)
    return files


SHARED = (
    "the driver and all ranks must see one folder. Put the checkpoints on a file system that all nodes share, with "
    "checkpoint.path=FOLDER or output_dir=FOLDER, or keep the learner on the driver's node"
)


def write(folder: Path, files: Mapping[str, Record], step: int) -> None:
    """The list itself, with step and time (seconds since 1970), and on the disk with all names around it. Raises OSError."""
    path = folder / NAME
    text = json.dumps({"step": step, "written": time.time(), "files": dict(sorted(files.items()))}, indent=1)
    path.write_text(text + "\n", encoding="utf8")
    for inside in (path, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(inside)


def read(folder: Path) -> dict[str, Any]:
    """{"step", "written", "files"}. Raises CheckpointError if the list is damaged, or missing."""
    return parse((folder / NAME).read_bytes, f"{folder / NAME}")


def parse(get, where: str) -> dict[str, Any]:
    """The list in the bytes that `get()` gives; see `read`."""
    try:
        found = json.loads(get())
        if not isinstance(found["files"], dict) or not isinstance(found["step"], int):
            raise ValueError("it is no list of files")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} cannot be read ({error or type(error).__name__})") from error


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint: the first file that is missing, cut or changed, and how; empty if all are as they were
    written. Folders from before there were lists pass for whole."""
    if not (folder / NAME).exists():
        return ""
    try:
        files = read(folder)["files"]
    except CheckpointError as error:
        return str(error)
    for name, known in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != known["size"]:
                return f"{path} has {size} bytes instead of {known['size']}"
            if record(path)["sha256"] != known["sha256"]:
                return f"{path} has the right size and other content than was written"
        except (OSError, KeyError) as error:
            return f"{path} cannot be read ({error})"
    return ""
