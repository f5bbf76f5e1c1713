"""The driver's only door to the outside: one `Monitor` a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from rlpipe.config import RunConfig
from rlpipe.errors import CheckpointError
from rlpipe.monitor.console import COLUMNS, Column, Console, Phase, printable
from rlpipe.monitor.files import write_json, write_text, writing
from rlpipe.monitor.latest import point_latest
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.monitor.metrics import MetricsLog
from rlpipe.monitor.report import write_report
from rlpipe.monitor.samples import SampleRow, SampleStore, extremes
from rlpipe.monitor.tracker import TABLE_ROWS, Tracker

__all__ = ["Monitor", "SampleRow"]


class Monitor:
    """Console, metrics.jsonl, samples, W&B, summary and report of one run.

    Creates `run_dir` with config.yaml, metrics.jsonl and trajectories/; `<output_dir>/<recipe>/latest` points at it.
    resume: {"step": of the checkpoint, "wandb_id": from `state()`}; what was logged after that step is dropped, since
    it is about to be logged again. stream: of the console, standard output if None. progress_s, columns: see `Console`.
    Raises CheckpointError if the folder cannot be written or holds another run.
    """

    def __init__(
        self,
        run_dir: Path,
        cfg: RunConfig,
        *,
        config_yaml: str,
        resume: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
        progress_s: float = 10.0,
        columns: Sequence[Column] = COLUMNS,
    ):
        self.run_dir, self.cfg, self.warnings = Path(run_dir), cfg, 0
        self.console = Console(stream, progress_s, columns)
        self.store = SampleStore(self.run_dir / "trajectories")
        step = None if resume is None else int(resume["step"])
        with writing(self.run_dir):
            self.store.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", step)
        if step is not None:
            with writing(self.run_dir):
                self.store.drop_after(step)
                (self.run_dir / "summary.json").unlink(missing_ok=True)  # it told how the interrupted run ended
        write_text(self.run_dir / "config.yaml", config_yaml)
        with writing(self.run_dir):
            point_latest(Path(cfg.output_dir) / cfg.name, self.run_dir)
        self._log = _LogFile(self.run_dir / "log.txt", self.console)
        logging.getLogger("rlpipe").addHandler(self._log)
        wandb_id = None if resume is None else resume.get("wandb_id")
        shown = self.store.last_rows(TABLE_ROWS) if step is not None else []
        self.tracker = Tracker(cfg, self.run_dir, wandb_id=wandb_id, rows=shown, note=self.note, warn=self.warn)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line in metrics.jsonl, the same numbers in W&B, one row on the console.

        Keys are `section/name` with a section of `metrics.SECTIONS`; wall-clock only under perf/. Non-finite numbers
        are written as null and warned of. Raises ValueError for another key or a step out of order, CheckpointError if
        the disk refuses the line.
        """
        broken = self.metrics.append(step, metrics)
        self.tracker.log(step, metrics)
        self.console.row(step, metrics)
        for key in broken:
            self.warn(f"step {step}: {key} is {float(metrics[key])}, written as null")

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Phase]:
        """Shows the progress of long work: `with monitor.phase("evaluation", 256) as phase: phase.advance(8)`."""
        return self.console.phase(name, total, self.note)

    def note(self, text: str) -> None:
        """A line on the console and, with its time, in log.txt."""
        self._say(text)

    def warn(self, text: str) -> None:
        """As `note`, marked and counted."""
        self.warnings += 1
        self._say(f"warning: {text}", "yellow")

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Keep the step's best and worst responses, `monitor.samples` in all, in trajectories/ and in W&B's table.

        Raises CheckpointError if they cannot be written."""
        kept = extremes(rows, self.cfg.monitor.samples)
        if kept:
            self.store.write(step, kept)
            self.tracker.samples(step, kept)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must carry for a later `resume`."""
        return {"wandb_id": self.tracker.id}

    def finish(self, summary: Mapping[str, Any], *, status: str) -> None:
        """Write summary.json and report.html, close W&B, say how it went and where to look.

        status: "finished", or what happened instead. Raises CheckpointError if summary or report cannot be written; at
        any status but "finished" that is a warning, since the failure that ended the run is already on its way up.
        """
        summary = {
            **summary,
            "status": status,
            "warnings": self.warnings,
            "versions": package_versions(),
            "machine": machine_facts(),
        }
        problems = []
        for write in (lambda: write_json(self.run_dir / "summary.json", summary), lambda: write_report(self.run_dir)):
            try:
                write()
            except CheckpointError as error:
                problems.append(error)
                self.warn(str(error))
        self.tracker.finish(summary, succeeded=status == "finished")
        lines = closing_lines(summary, self.run_dir, self.tracker.where, self.cfg.steps)
        for line in lines:
            self.console.line(line)
        self._log.add("\n".join(lines).strip())
        logging.getLogger("rlpipe").removeHandler(self._log)
        if problems and status == "finished":
            raise problems[0]

    def _say(self, text: str, style: str = "") -> None:
        self.console.line(f"{time.strftime('%H:%M:%S')} {text}", style)
        self._log.add(text)


class _LogFile(logging.Handler):
    """log.txt: notes and what the package's logger says, with time. If it cannot be written the console says so, once:
    the metrics of the step are the write that must not fail."""

    def __init__(self, path: Path, console: Console):
        super().__init__(logging.INFO)
        self.path, self.console, self._broken = path, console, False

    def emit(self, record: logging.LogRecord) -> None:
        self.add(record.getMessage())

    def add(self, text: str) -> None:
        text = printable(text).replace("\n", "\n" + " " * 20)  # later lines stand under the first, behind its time
        try:
            with self.path.open("a", encoding="utf8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            if not self._broken:
                self._broken = True
                self.console.line(f"warning: {self.path} cannot be written ({error}); later lines are on the console only")


def closing_lines(summary: Mapping[str, Any], run_dir: Path, wandb_where: str, steps: int) -> list[str]:
    """Before and after, and where to look next."""
    status, done = summary["status"], summary.get("steps")
    lines = [""]
    if status == "finished":
        seconds = f" in {summary['seconds']:.0f} s" if summary.get("seconds") else ""
        lines.append(f"finished: {done} steps{seconds}")
    else:
        lines.append(f"{status}{f' at step {done} of {steps}' if done is not None else ' before the first step'}")
    before, after = summary.get("eval_start"), summary.get("eval_final")
    if before is not None and after is not None:
        lines.append(f"  held-out accuracy   {before:.3f} before, {after:.3f} after ({after - before:+.3f})")
    before, after = summary.get("held_out_start"), summary.get("held_out_final")
    if before is not None and after is not None:
        lines.append(f"  held-out loss       {before:.4f} nats a token before, {after:.4f} after ({after - before:+.4f})")
    if summary.get("parity_max_abs_delta") is not None:
        lines.append(f"  parity              {summary['parity_max_abs_delta']:.1e} at most between rollout and learner")
    if summary.get("tokens_per_s"):
        lines.append(f"  speed               {summary['tokens_per_s']:.0f} response tokens/s over the whole step")
    if summary["warnings"]:
        lines.append(f"  warnings            {summary['warnings']}, see {run_dir / 'log.txt'}")
    lines.append("look next:")
    if summary.get("model"):
        lines.append(f"  model               {summary['model']}")
    lines.append(f"  report              {run_dir / 'report.html'}")
    lines.append(f"  metrics             {run_dir / 'metrics.jsonl'}")
    if wandb_where:
        lines.append(f"  W&B                 {wandb_where}")
    if status != "finished":
        lines.append("  continue            the same command with resume=auto, if a checkpoint was written")
    return lines
