"""The terminal: a row a step, notes, and progress of long phases. Colour and bars only on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

COLUMNS = (  # heading, metric, format
    ("step", None, "{:>5d}"),
    ("reward", "reward/mean", "{:>7.3f}"),
    ("eval", "eval/accuracy", "{:>6.3f}"),
    ("live", "algo/live_groups", "{:>5.0f}"),
    ("clip", "algo/clip_fraction", "{:>6.3f}"),
    ("entropy", "algo/entropy", "{:>8.3f}"),
    ("grad", "algo/grad_norm", "{:>7.2f}"),
    ("parity", "parity/max_abs_delta", "{:>8.1e}"),
    ("tok/s", "perf/rollout_tokens_per_s", "{:>7.0f}"),
    ("s/step", "perf/step_s", "{:>7.2f}"),
)
HEADER_EVERY = 20
PROGRESS_S = 10.0


class Console:
    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.rows = 0

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def row(self, step: int, metrics: dict[str, float]) -> None:
        """One step; the heading comes back every 20 rows."""
        if self.rows % HEADER_EVERY == 0:
            heading = " ".join(f"{name:>{_width(form)}}" for name, _, form in COLUMNS)
            self.line(f"\x1b[1m{heading}\x1b[0m" if self.terminal else heading)
        self.rows += 1
        values = [step if key is None else metrics.get(key) for _, key, _ in COLUMNS]
        cells = [
            " " * _width(form) if value is None else form.format(value)
            for value, (_, _, form) in zip(values, COLUMNS, strict=True)
        ]
        self.line(" ".join(cells))


def _width(form: str) -> int:
    return int(form.split(">")[1].split(".")[0].rstrip("df}"))


class Phase:
    """Progress of a long phase: a bar on a terminal, else a line at most every ten seconds."""

    def __init__(self, console: Console, name: str, total: int | None):
        self.console, self.name, self.total = console, name, total
        self.done, self.started = 0, time.monotonic()
        self.shown = self.started
        self.bar: Any = None

    def __enter__(self) -> Phase:
        if self.console.terminal and self.total:
            from rich.console import Console as RichConsole
            from rich.progress import Progress

            self.bar = Progress(console=RichConsole(file=self.console.stream), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total)
        return self

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
        elif time.monotonic() - self.shown >= PROGRESS_S:
            self.shown = time.monotonic()
            self.console.line(self._text())

    def _text(self) -> str:
        of = f"/{self.total}" if self.total else ""
        return f"{self.name}: {self.done}{of} ({time.monotonic() - self.started:.0f} s)"

    def __exit__(self, *failure: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.done:
            self.console.line(self._text())
