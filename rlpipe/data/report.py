"""What became of the records of a file: counted, and those left out listed with the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAME = "left_out.jsonl"
LISTED = 10_000  # reasons kept; the counts go on
SHOWN = 5
BAD, TOO_LONG, HELD_OUT, TESTED, DIFFICULTY = "bad", "too long", "held out", "also in the test set", "too easy or too hard"
DEMONSTRATION = "without a demonstration that fits"


@dataclass(slots=True)
class Report:
    """origin: what was read · shape: of its records · read: records, bad ones included · dropped: how many for which reason ·
    listed: (reason, place, what is the matter) of the first of them."""

    origin: str
    shape: str = ""
    read: int = 0
    dropped: Counter = field(default_factory=Counter)
    listed: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def used(self) -> int:
        return self.read - self.dropped.total()

    def drop(self, reason: str, place: str, detail: str) -> None:
        self.dropped[reason] += 1
        if len(self.listed) < LISTED:
            self.listed.append((reason, place, detail))

    def lines(self, shown: int = SHOWN) -> list[str]:
        """The counts, then the first few that were left out for another reason than being a test prompt."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        head = f"{self.origin}: {self.used} of {self.read} records used, shape {self.shape}"
        head += f"; left out: {left_out}" if left_out else ""
        odd = [f"  {reason}: {detail}" for reason, _, detail in self.listed if reason not in (TESTED, HELD_OUT)]
        more = [f"  … and {len(odd) - shown} more"] if len(odd) > shown else []
        return [head, *odd[:shown], *more]


def write(reports: Sequence[Report], path: Path) -> bool:
    """One JSON object a line for every record that was left out (the first of each reader); no file if there is none."""
    lines = [
        json.dumps({"origin": report.origin, "reason": reason, "place": place, "detail": detail}, ensure_ascii=False)
        for report in reports
        for reason, place, detail in report.listed
    ]
    if lines:
        path.write_text("\n".join(lines) + "\n", encoding="utf8", errors="backslashreplace")
    return bool(lines)
