"""The console: a row a step, a bar or a line for long phases, notes between them.

A terminal gets colours and moving bars (rich); anything else gets plain aligned lines that read well in a file.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

HEADER_EVERY = 20  # rows


@dataclass(frozen=True, slots=True)
class Column:
    """title · key of the metric · format of the number · style on a terminal · least width."""

    title: str
    key: str
    form: str
    style: str = ""
    least: int = 7

    @property
    def width(self) -> int:
        return max(self.least, len(self.title))

    def text(self, value: float | None) -> str:
        """The value, right-aligned; blank if missing."""
        if value is None:
            return " " * self.width
        return (format(value, self.form) if math.isfinite(value) else str(float(value))).rjust(self.width)


COLUMNS = (
    Column("reward", "reward/mean", ".3f", "bold"),
    Column("solved", "eval/accuracy", ".3f", "bold green"),
    Column("live", "algo/live_groups", ".0f"),
    Column("clip", "algo/clip_fraction", ".4f"),
    Column("entropy", "algo/entropy", ".3f"),
    Column("grad", "algo/grad_norm", ".3g"),
    Column("parity", "parity/max_abs_delta", ".1e"),
    Column("tok/s", "perf/rollout_tokens_per_s", ".0f"),
    Column("s/step", "perf/step_s", ".2f"),
)
ASYNC_COLUMNS = (  # what mode async has besides, narrow: 94 characters in all
    Column("lag", "rollout/lag_max", ".0f", least=3),  # weight versions, of the oldest group
    Column("ready", "cluster/groups_ready", ".0f", least=5),  # groups that wait for the learner
    Column("idle", "cluster/idle_rollout", ".2f", least=4),  # share of the rollout workers' time
)


def columns_of(mode: str) -> tuple[Column, ...]:
    """Of a run in that `mode`."""
    return (*COLUMNS, *ASYNC_COLUMNS) if mode == "async" else COLUMNS


def header(columns: Sequence[Column] = COLUMNS) -> str:
    return " ".join(["  step", *(column.title.rjust(column.width) for column in columns)])


def row(step: int, metrics: Mapping[str, float], columns: Sequence[Column] = COLUMNS) -> str:
    """One aligned line; missing metrics are blank."""
    return " ".join([f"{step:6d}", *(column.text(metrics.get(column.key)) for column in columns)]).rstrip()


def printable(text: str) -> str:
    """`text` without control characters: model output may carry terminal escapes. Line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class Phase:
    """Progress inside one `Console.phase`: call `advance` as work is done."""

    def __init__(self, name: str, total: int | None, shown: Callable[[Phase], None]):
        self.name, self.total, self.done = name, total or None, 0
        self._started, self._shown = time.monotonic(), shown

    def advance(self, n: int = 1) -> None:
        self.done += n
        self._shown(self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def count(self) -> str:
        return f"{self.done}/{self.total}" if self.total else str(self.done)

    def line(self) -> str:
        return f"{self.name}: {self.count} ({self.seconds:.0f} s)"


class Console:
    """stream: None for standard output · progress_s: seconds between two lines of a phase, if not a terminal · columns: of a
    step's row."""

    def __init__(self, stream: TextIO | None = None, progress_s: float = 10.0, columns: Sequence[Column] = COLUMNS):
        self.columns = columns
        self.stream = sys.stdout if stream is None else stream
        self.progress_s, self._rows = progress_s, 0
        self._rich: Any = None
        self._bars: Any = None
        self._open_bars = 0
        if self.stream.isatty():
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=self.stream, highlight=False, markup=False, emoji=False)

    @property
    def is_terminal(self) -> bool:
        return self._rich is not None

    def line(self, text: str, style: str = "") -> None:
        """One line (or several); control characters are shown, not obeyed."""
        text = printable(text)
        encoding = getattr(self.stream, "encoding", None) or "utf8"
        text = text.encode(encoding, errors="replace").decode(encoding)
        if self._rich is not None:
            self._rich.print(text, style=style or None, soft_wrap=True)
            return
        self.stream.write(text + "\n")
        self.stream.flush()

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """The step's row, under a header that returns every HEADER_EVERY rows."""
        if self._rows % HEADER_EVERY == 0:
            self.line(header(self.columns), "bold underline")
        self._rows += 1
        if self._rich is None:
            self.line(row(step, metrics, self.columns))
            return
        from rich.text import Text

        styled = Text().append(f"{step:6d}", style="cyan")
        for column in self.columns:
            value = metrics.get(column.key)
            broken = value is not None and not math.isfinite(value)
            styled.append(" ").append(column.text(value), style="bold red" if broken else column.style or None)
        self._rich.print(styled, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None, closing: Callable[[str], None]) -> Iterator[Phase]:
        """Show progress of the block; its last line goes to `closing`, also when the block fails."""
        with self._bar(name, total) if self.is_terminal else self._lines() as shown:
            phase = Phase(printable(name), total, shown)
            if not self.is_terminal:
                self.line(phase.line() if phase.total else f"{name} …")
            try:
                yield phase
            except BaseException:
                closing(f"{name}: stopped at {phase.count} ({phase.seconds:.0f} s)")
                raise
        closing(phase.line() if phase.done else f"{name}: done ({phase.seconds:.0f} s)")

    @contextlib.contextmanager
    def _lines(self) -> Iterator[Callable[[Phase], None]]:
        last = time.monotonic()

        def shown(phase: Phase) -> None:
            nonlocal last
            if time.monotonic() - last >= self.progress_s and phase.done != phase.total:
                last = time.monotonic()
                self.line(phase.line())

        yield shown

    @contextlib.contextmanager
    def _bar(self, name: str, total: int | None) -> Iterator[Callable[[Phase], None]]:
        """A bar that is wiped when its phase ends; phases inside one another share one display."""
        if self._bars is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=self._rich, transient=True)
        if self._open_bars == 0:
            self._bars.start()
        self._open_bars += 1
        task = self._bars.add_task(printable(name), total=total or None)
        try:
            yield lambda phase: self._bars.update(task, completed=phase.done)
        finally:
            self._bars.remove_task(task)
            self._open_bars -= 1
            if self._open_bars == 0:
                self._bars.stop()
