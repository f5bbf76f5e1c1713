"""log.txt: what the run told, with its time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from rlpipe.monitor.console import Console, printable


class LogFile(logging.Handler):
    """Notes, and what the package's logger says. If the file cannot be written the console says so, once: the metrics of the
    step are the write that must not fail.

    incident(kind, text, track): hears records with `extra={"incident": kind}` (and perhaps "track"), by which parts of the
    package that know no monitor tell what they did about a failure.
    """

    def __init__(self, path: Path, console: Console, incident: Callable[[str, str, str], None]):
        super().__init__(logging.INFO)
        self.path, self.console, self._incident, self._broken = path, console, incident, False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.add(text)
        kind = getattr(record, "incident", None)
        if kind is not None:
            try:
                self._incident(kind, text, getattr(record, "track", "driver"))
            except Exception:  # as handlers do: a record must not fail the work that it tells of
                self.handleError(record)

    def add(self, text: str) -> None:
        text = printable(text).replace("\n", "\n" + " " * 20)  # later lines stand under the first, behind its time
        try:
            with self.path.open("a", encoding="utf8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            if not self._broken:
                self._broken = True
                self.console.line(f"warning: {self.path} cannot be written ({error}); later lines are on the console only")
