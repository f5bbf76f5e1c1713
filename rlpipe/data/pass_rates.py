"""How often a prompt was solved: written by a run as it goes, read by a later one to choose and to order its records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import SEEK_END
from pathlib import Path
from random import Random
from typing import BinaryIO

from rlpipe.data.records import Record
from rlpipe.errors import ConfigError, DataError
from rlpipe.trajectory import Prompt

NAME = "pass_rates.jsonl"
LONGEST_LINE = 1 << 16  # bytes
UNKNOWN = 0.5  # the place in a curriculum of a record without a figure
EVERYTHING = (0.0, 1.0)  # the default of data.difficulty; rewards may lie outside, and are not left out for that
ORDERS = ("none", "easy_to_hard", "target")


@dataclass(frozen=True, slots=True)
class PassRateLog:
    """Appends a line a scored group to `path`: uid of the prompt, record (what it is a pass over), mean reward, count.

    A run that resumes writes the groups of the steps it repeats once more, with the uids they had; a reader takes the last. A
    line that a killed run left half written is cut off first.
    """

    path: Path

    def add(self, groups: Iterable[tuple[Prompt, Sequence[float]]]) -> None:
        """groups: each prompt with the rewards of its responses."""
        facts = [(p.uid, p.record or p.uid, round(sum(rewards) / len(rewards), 6), len(rewards)) for p, rewards in groups]
        lines = [json.dumps(dict(zip(("uid", "record", "mean", "count"), fact, strict=True))) for fact in facts]
        if lines:
            with self.path.open("a+b") as file:
                _cut_torn_line(file)
                file.write(("\n".join(lines) + "\n").encode())


def _cut_torn_line(file: BinaryIO) -> None:
    """Truncate to the last end of a line."""
    end = file.seek(0, SEEK_END)
    start = file.seek(max(0, end - LONGEST_LINE))
    whole = file.read().rfind(b"\n") + 1
    if start + whole < end:
        file.truncate(start + whole)


def read(file: str) -> dict[str, tuple[float, int]]:
    """record → (mean reward, responses) over everything that was ever logged of it. file: one, or the folder of a run.

    Lines with a uid that comes again count once, as the last says. Raises DataError, naming file and line.
    """
    path = Path(file) / NAME if Path(file).is_dir() else Path(file)
    if not path.is_file():
        raise DataError(f"data.pass_rates={file}: there is no file {path}; give the {NAME} of a run, or the run's folder")
    last: dict[str, tuple[str, float, int]] = {}
    lines = path.read_text(encoding="utf8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            uid, record, mean, count = found["uid"], found["record"], float(found["mean"]), int(found["count"])
            if not (isinstance(uid, str) and isinstance(record, str) and math.isfinite(mean) and count > 0):
                raise ValueError("uid and record are texts, mean a finite number, count above 0")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # the run was stopped in the middle of it
                continue
            raise DataError(f"{path}:{number}: not a line of {NAME}: {type(error).__name__}: {error}") from error
        last[uid] = (record, mean, count)
    if not last:
        raise DataError(f"data.pass_rates={file}: {path} holds no figures yet")
    sums: dict[str, list[float]] = {}
    for record, mean, count in last.values():
        total = sums.setdefault(record, [0.0, 0])
        total[0] += mean * count
        total[1] += count
    return {record: (total / count, int(count)) for record, (total, count) in sums.items()}


@dataclass(frozen=True, slots=True)
class Difficulty:
    """rates: of records by key · low, high: records with a rate outside are left out, those without one stay · curriculum:
    none | easy_to_hard: falling pass rate | target: nearest to the middle of low and high first. Every pass has this order;
    equals, and records without a figure (which count as 0.5), are shuffled afresh."""

    rates: Mapping[str, tuple[float, int]]
    low: float = 0.0
    high: float = 1.0
    curriculum: str = "none"

    @classmethod
    def of(cls, pass_rates: str, difficulty: Sequence[float], curriculum: str) -> Difficulty:
        """From the settings of the same names. Raises ConfigError if they contradict each other."""
        if curriculum not in ORDERS:
            raise ConfigError(f"data.curriculum={curriculum} is not one of {', '.join(ORDERS)}")
        if len(difficulty) != 2 or not difficulty[0] <= difficulty[1]:
            raise ConfigError(f"data.difficulty={list(difficulty)}: [low, high], pass rates with low at most high")
        chosen = [f"data.curriculum={curriculum}"] * (curriculum != "none")
        chosen += [f"data.difficulty={list(difficulty)}"] * (tuple(difficulty) != EVERYTHING)
        if chosen and not pass_rates:
            raise ConfigError(f"{chosen[0]} goes by measured pass rates; set data.pass_rates to the {NAME} of a run")
        return cls(read(pass_rates) if pass_rates else {}, *map(float, difficulty), curriculum)

    def refuses(self, record: Record) -> str:
        """Why the record is left out, empty if it stays."""
        rate = self.rates.get(record.key, (None, 0))[0]
        if rate is None or (self.low, self.high) == EVERYTHING or self.low <= rate <= self.high:
            return ""
        return f"pass rate {rate:.3f} outside {self.low:g} to {self.high:g}"

    def order(self, records: Sequence[Record], generator: Random) -> list[Record]:
        shown = list(records)
        generator.shuffle(shown)
        if self.curriculum == "easy_to_hard":
            shown.sort(key=lambda record: -self.rates.get(record.key, (UNKNOWN, 0))[0])
        elif self.curriculum == "target":
            middle = (self.low + self.high) / 2
            shown.sort(key=lambda record: abs(self.rates.get(record.key, (UNKNOWN, 0))[0] - middle))
        return shown
