"""The driver's only door to the outside: one `Monitor` a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

from rlpipe.config import RunConfig
from rlpipe.errors import CheckpointError
from rlpipe.monitor.closing import closing_lines
from rlpipe.monitor.console import Column, Console, Phase, columns_of
from rlpipe.monitor.files import write_json, write_text, writing
from rlpipe.monitor.health import IdleMeter, cluster_summary, lag_metrics, memory_metrics
from rlpipe.monitor.incidents import IncidentLog, Lost, lost_work
from rlpipe.monitor.latest import point_latest
from rlpipe.monitor.logfile import LogFile
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.monitor.metrics import MetricsLog, read_metrics
from rlpipe.monitor.report import write_report
from rlpipe.monitor.resources import Sampler
from rlpipe.monitor.samples import SampleRow, SampleStore, extremes
from rlpipe.monitor.steplog import StepLog
from rlpipe.monitor.timeline import NAME, Timeline
from rlpipe.monitor.tracker import TABLE_ROWS, Tracker

__all__ = ["Lost", "Monitor", "SampleRow"]
COUNTED = ("restarts", "retries", "timeouts", "rollbacks")  # totals of incidents that every step's metrics carry
QUEUES = ("cluster/groups_under_way", "cluster/groups_ready", "cluster/units_waiting")  # drawn over time in the timeline


class Monitor:
    """Console, metrics.jsonl, prompts.jsonl, timeline, incidents, samples, W&B, summary and report of one run.

    Creates `run_dir` with config.yaml, metrics.jsonl and trajectories/; `<output_dir>/<recipe>/latest` points at it.
    resume: {"step": of the checkpoint, "wandb_id": from `state()`}; what was logged after that step is dropped, since
    it is about to be logged again. stream: of the console, standard output if None. progress_s, columns: see `Console`;
    without columns, those of the run's mode. `timeline` takes spans from any thread; `incident`, `note` and `warn` as well.
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
        columns: Sequence[Column] | None = None,
    ):
        self.run_dir, self.cfg, self.warnings = Path(run_dir), cfg, 0
        self.console = Console(stream, progress_s, columns_of(cfg.mode) if columns is None else columns)
        self.store = SampleStore(self.run_dir / "trajectories")
        step = None if resume is None else int(resume["step"])
        with writing(self.run_dir):
            self.store.folder.mkdir(parents=True, exist_ok=True)
        self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", step)
        self._prompts = StepLog(self.run_dir / "prompts.jsonl", step)
        if step is not None:
            with writing(self.run_dir):
                self.store.drop_after(step)
                (self.run_dir / "summary.json").unlink(missing_ok=True)  # it told how the interrupted run ended
        write_text(self.run_dir / "config.yaml", config_yaml)
        with writing(self.run_dir):
            point_latest(Path(cfg.output_dir) / cfg.name, self.run_dir)
        self._log = LogFile(self.run_dir / "log.txt", self.console, self._count)
        logging.getLogger("rlpipe").addHandler(self._log)
        self._idle, self._sampler, self._memory = IdleMeter(), None, {}
        self._logged_at: float | None = None
        self.incidents = IncidentLog(self.run_dir / "incidents.jsonl", fresh=step is None, note=self.warn)
        self.timeline = Timeline(self.run_dir / NAME if cfg.monitor.timeline else None, warn=self.warn, heard=self._idle.add)
        wandb_id = None if resume is None else resume.get("wandb_id")
        shown = self.store.last_rows(TABLE_ROWS) if step is not None else []
        self.tracker = Tracker(cfg, self.run_dir, wandb_id=wandb_id, rows=shown, note=self.note, warn=self.warn)
        if step is not None:
            lost = lost_work(self.metrics.dropped)
            self.incident("resume", f"resumed at step {step}; {lost}", **lost.facts())

    @property
    def last_step(self) -> int:
        """The last one logged, -1 before any."""
        return self.metrics.last_step

    def watch(self) -> None:
        """From now on the state of the connected cluster is sampled and joins the metrics, as do the counts of incidents."""
        if self._sampler is None:
            self._sampler = Sampler(self.warn)

    def log(self, step: int, metrics: Mapping[str, float], lags: Sequence[int] = ()) -> None:
        """One line in metrics.jsonl, the same numbers in W&B, one row on the console.

        Keys are `section/name` with a section of `metrics.SECTIONS`; wall-clock only under perf/ and cluster/. lags: in
        weight versions, of each group that the step trained on; their mean, most and shares join the metrics, as does what
        the monitor knows of the cluster (a key that is given wins). Non-finite numbers are written as null and warned of.
        Raises ValueError for another key or a step out of order, CheckpointError if the disk refuses the line.
        """
        metrics = self._of_cluster() | lag_metrics(lags) | dict(metrics)
        broken = self.metrics.append(step, metrics)
        self._logged_at = time.monotonic()
        depths = {key.removeprefix("cluster/"): metrics[key] for key in QUEUES if key in metrics}
        if depths:
            self.timeline.count("queues", **depths)
        self.tracker.log(step, metrics, lags)
        self.console.row(step, metrics)
        for key in broken:
            self.warn(f"step {step}: {key} is {float(metrics[key])}, written as null")

    def prompts(self, step: int, record: Mapping[str, Sequence[int]]) -> None:
        """One line in prompts.jsonl: which prompts the step used up, as indices of the cursor, {"trained": [...],
        "without_signal": [...], "failed": [...]}. Raises ValueError for a step out of order, CheckpointError if the disk
        refuses the line."""
        self._prompts.append(step, record)

    def memory(self, replies: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """What workers answered to `usage()`, by role; joins the next step's metrics."""
        self._memory |= memory_metrics(replies)

    def incident(self, kind: str, text: str, *, track: str = "driver", **facts: float) -> None:
        """A warning that is also a line of incidents.jsonl, a mark on the track of the timeline and a count in the metrics.

        kind: one of `incidents.KINDS`. Whoever has no monitor logs with `extra={"incident": kind, "track": track}` to the
        package's logger, to the same end.
        """
        self._say(text if kind == "resume" else f"warning: {text}", "" if kind == "resume" else "yellow")
        self._count(kind, text, track, **facts)

    def rewind(self, step: int, why: str = "") -> Lost:
        """The run goes back to what it was after `step`: later lines and samples are dropped, so that the same steps can be
        logged again. Returns what was lost. why: ends the line about it. Raises CheckpointError.

        The timeline and incidents.jsonl keep all that happened; W&B shows both attempts (see `Tracker.rewind`).
        """
        since = time.monotonic() - self._logged_at if self._logged_at is not None else 0.0
        lost = lost_work(self.metrics.rewind(step), since)
        self._prompts.rewind(step)
        with writing(self.store.folder):
            self.store.drop_after(step)
        self.tracker.rewind(step)
        self._logged_at = time.monotonic()
        self.incident("rollback", f"back to step {step}{f': {why}' if why else ''}; {lost}", **lost.facts())
        return lost

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
        """Write summary.json and report.html, close W&B and the timeline, say how it went and where to look.

        status: "finished", or what happened instead. Raises CheckpointError if summary or report cannot be written; at
        any status but "finished" that is a warning, since the failure that ended the run is already on its way up.
        """
        if self._sampler is not None:
            self._sampler.close()
        self.timeline.close()
        problems: list[CheckpointError] = []

        def surely(write: Callable[[], Any]) -> Any:
            try:
                return write()
            except CheckpointError as error:
                problems.append(error)
                self.warn(str(error))
                return None

        lines = surely(lambda: read_metrics(self.metrics.path)) or []
        summary = {
            **summary,
            "status": status,
            "cluster": cluster_summary(lines, self.incidents.totals),
            "warnings": self.warnings,
            "versions": package_versions(),
            "machine": machine_facts(),
        }
        surely(lambda: write_json(self.run_dir / "summary.json", summary))
        surely(lambda: write_report(self.run_dir))
        self.tracker.finish(summary, succeeded=status == "finished")
        lines = closing_lines(summary, self.run_dir, self.tracker.where, self.cfg.steps)
        for line in lines:
            self.console.line(line)
        self._log.add("\n".join(lines).strip())
        logging.getLogger("rlpipe").removeHandler(self._log)
        if problems and status == "finished":
            raise problems[0]

    def _of_cluster(self) -> dict[str, float]:
        """What the monitor knows by itself. Nothing, for a run that does not `watch` and tells no spans."""
        metrics = {f"cluster/idle_{role}": share for role, share in self._idle.reading().items()}
        if self._sampler is not None:
            metrics |= {f"cluster/{key}": value for key, value in self._sampler.reading().items()}
            metrics |= {f"cluster/{key}": float(self.incidents.totals[key]) for key in COUNTED}
        memory, self._memory = self._memory, {}
        return metrics | {key: max(value, metrics.get(key, value)) for key, value in memory.items()}

    def _count(self, kind: str, text: str, track: str = "driver", **facts: float) -> None:
        """An incident that was said already."""
        if kind != "resume":
            self.warnings += 1
        self.incidents.add(kind, text, step=self.metrics.last_step + 1, track=track, **facts)
        self.timeline.mark(track, kind, text=text)

    def _say(self, text: str, style: str = "") -> None:
        self.console.line(f"{time.strftime('%H:%M:%S')} {text}", style)
        self._log.add(text)
