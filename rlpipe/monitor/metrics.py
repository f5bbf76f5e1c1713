"""metrics.jsonl: one JSON line a step, on the disk before the step counts as logged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError
from rlpipe.monitor.files import append_line, write_text, writing

SECTIONS = ("reward", "rollout", "algo", "sft", "value", "parity", "perf", "eval")


class MetricsLog:
    """The metrics of one run.

    resume_step: None for a new run; else lines of later steps, and a last line that a crash cut short, are dropped at
    once, so that the run continues as if it had stopped there. Raises CheckpointError if the file cannot be written, is
    damaged before its last line, or holds another run already.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path, self.last_step = path, -1
        lines = read_metrics(path) if path.exists() else []
        if resume_step is None:
            if lines:
                raise CheckpointError(
                    f"{path} already holds {len(lines)} steps of another run; give resume={path.parent} to continue "
                    "it, or another run_id="
                )
            write_text(path, "")
            return
        kept = [line for line in lines if line["step"] <= resume_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        if kept:
            self.last_step = kept[-1]["step"]

    def append(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Write one line, keys sorted; returns the keys whose value is not finite (written as null).

        Raises ValueError for a key outside the sections or a step that is not later than the last: both are mistakes
        in the code that calls. Raises CheckpointError if the line does not reach the disk.
        """
        if step <= self.last_step:
            raise ValueError(f"step {step} is logged after step {self.last_step}; each step is logged once, in order")
        values = {key: float(metrics[key]) for key in sorted(metrics)}
        for key in values:
            section, _, name = key.partition("/")
            if section not in SECTIONS or not name:
                raise ValueError(f"metric {key!r} needs a section: one of {', '.join(s + '/' for s in SECTIONS)}")
        broken = [key for key, value in values.items() if not math.isfinite(value)]
        line = {"step": step} | {key: None if key in broken else value for key, value in values.items()}
        append_line(self.path, json.dumps(line, allow_nan=False))
        self.last_step = step
        return broken


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; {"step": int, "section/name": float or None}.

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
