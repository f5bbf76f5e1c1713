"""Sample responses of a run: one small JSON file a step, enough to watch the denoising again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError
from rlpipe.monitor.files import write_json


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One response as shown to people.

    tokens: how many count (up to the first EOS) · steps: denoising steps · step_map: 1-based step of each commit,
    0 for never, None if tokens changed after their commit · token_texts: one text a token, as long as step_map · parts:
    what the verifier said besides the reward.
    """

    uid: str
    prompt: str
    response: str
    reward: float
    advantage: float
    tokens: int
    steps: int
    step_map: list[int] | None
    token_texts: list[str]
    parts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step_map is not None and len(self.step_map) != len(self.token_texts):
            raise ValueError(f"sample {self.uid}: {len(self.step_map)} commit steps for {len(self.token_texts)} tokens")


class SampleStore:
    """Folder `trajectories/` with step_NNNNNN.json: {"step": int, "rows": [SampleRow as dict]}, best reward first."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Raises CheckpointError."""
        write_json(self._path(step), {"step": step, "rows": [dataclasses.asdict(row) for row in rows]})

    def steps(self) -> list[int]:
        """Steps that have samples, in order."""
        return sorted(int(path.stem.removeprefix("step_")) for path in self.folder.glob("step_*[0-9].json"))

    def read(self, step: int) -> list[SampleRow]:
        """Raises CheckpointError if the file is damaged."""
        path = self._path(step)
        try:
            return [SampleRow(**row) for row in json.loads(path.read_text(encoding="utf8"))["rows"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}. Remove it; only this step's samples are lost") from error

    def drop_after(self, step: int) -> None:
        """Remove the samples of later steps."""
        for later in self.steps():
            if later > step:
                self._path(later).unlink()

    def last_rows(self, count: int) -> list[tuple[int, SampleRow]]:
        """The newest `count` rows with their steps, oldest first."""
        rows: list[tuple[int, SampleRow]] = []
        for step in reversed(self.steps()):
            if len(rows) >= count:
                break
            rows = [(step, row) for row in self.read(step)] + rows
        return rows[-count:]

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.json"


def extremes(rows: Sequence[SampleRow], keep: int) -> list[SampleRow]:
    """At most `keep` rows, best reward first: all, or the best and the worst in equal parts (one more of the best)."""
    ranked = sorted(rows, key=lambda row: (-row.reward, -row.advantage))
    if len(ranked) <= keep:
        return ranked
    worst = keep // 2
    return ranked[: keep - worst] + ranked[len(ranked) - worst :]
