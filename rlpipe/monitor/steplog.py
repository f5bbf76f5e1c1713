"""A file with one JSON line a step: durable when `append` returns, and cut back when the run goes back to an earlier step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError
from rlpipe.monitor.files import append_line, jsonable, write_text, writing


class StepLog:
    """The lines of one run, {"step": int, …}, steps strictly rising.

    resume_step: None for a new run, whose file must not hold lines yet; else lines of later steps, and a last line that a
    crash cut short, are dropped at once, so that the run continues as if it had stopped there; `dropped` has them. The file
    is made by its first line. Raises CheckpointError if it cannot be written, is damaged before its last line, or holds
    another run.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path, self.last_step = path, -1
        self.dropped: list[dict[str, Any]] = []
        lines = read_lines(path) if path.exists() else []
        if resume_step is not None:
            self.dropped = self.rewind(resume_step)
        elif lines:
            raise CheckpointError(
                f"{path} already holds {len(lines)} steps of another run; give resume={path.parent} to continue "
                "it, or another run_id="
            )

    def append(self, step: int, record: Mapping[str, Any]) -> None:
        """Write one line. Raises ValueError for a step that is not later than the last, CheckpointError if the line does
        not reach the disk."""
        if step <= self.last_step:
            raise ValueError(f"step {step} is logged after step {self.last_step}; each step is logged once, in order")
        append_line(self.path, json.dumps({"step": step} | jsonable(dict(record)), allow_nan=False))
        self.last_step = step

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of later steps in one atomic write; returns them. Raises CheckpointError."""
        lines = read_lines(self.path) if self.path.exists() else []
        kept = [line for line in lines if line["step"] <= step]
        if self.path.exists():
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.last_step = kept[-1]["step"] if kept else -1
        return lines[len(kept) :]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a `StepLog`, oldest first.

    A last line that a crash cut short is left out. Raises CheckpointError if another one is broken.
    """
    with writing(path):
        raw = path.read_bytes()
    whole = raw.split(b"\n")[:-1]
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, TypeError, KeyError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            if number == len(whole):
                break  # a disk that lost power may keep the line's end and not its middle
            raise CheckpointError(f"{path}, line {number} is broken ({error}); remove that line to go on") from error
        lines.append(line)
    return lines
