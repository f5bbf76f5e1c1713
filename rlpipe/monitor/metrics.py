"""metrics.jsonl: one JSON line a step, on the disk before the step counts as logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpipe.monitor.files import write_text
from rlpipe.monitor.steplog import StepLog, read_lines

SECTIONS = ("reward", "rollout", "algo", "sft", "value", "parity", "perf", "cluster", "eval")


class MetricsLog(StepLog):
    """The metrics of one run; the file is there from the start. See `StepLog`."""

    def __init__(self, path: Path, resume_step: int | None = None):
        super().__init__(path, resume_step)
        if not path.exists():
            write_text(path, "")

    def append(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Write one line, keys sorted; returns the keys whose value is not finite (written as null).

        Raises ValueError for a key outside the sections or a step that is not later than the last: both are mistakes
        in the code that calls. Raises CheckpointError if the line does not reach the disk.
        """
        values = {key: float(metrics[key]) for key in sorted(metrics)}
        for key in values:
            section, _, name = key.partition("/")
            if section not in SECTIONS or not name:
                raise ValueError(f"metric {key!r} needs a section: one of {', '.join(s + '/' for s in SECTIONS)}")
        super().append(step, values)
        return [key for key, value in values.items() if not math.isfinite(value)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, oldest first; {"step": int, "section/name": float or None}. See `read_lines`."""
    return read_lines(path)
