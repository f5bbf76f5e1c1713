"""The driver's one door to the outside."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rlpipe.config import RunConfig
from rlpipe.monitor.console import Console, Phase
from rlpipe.monitor.files import append_line, drop_after, jsonable, point_latest, record_of, write_atomic
from rlpipe.monitor.report import write_report
from rlpipe.monitor.tracker import Tracker

SECTIONS = ("reward", "rollout", "algo", "parity", "perf", "eval")
PACKAGES = ("rlpipe", "torch", "ray", "deepspeed", "transformers", "wandb", "numpy", "reasoning-gym")
KEPT_SAMPLES = 200  # rows of the W&B table


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One response to look at. step_map: 1-based denoising step of each token, 0 never, None if tokens were edited ·
    token_texts: every token of the canvas on its own · parts: what the verifier returned."""

    uid: str
    prompt: str
    response: str
    reward: float
    advantage: float
    tokens: int
    steps: int
    step_map: list[int] | None
    token_texts: list[str]
    parts: dict[str, float]


class Monitor:
    """Files under run_dir, a console, W&B. resume: {"step": k, "wandb_id": …} of the checkpoint a run continues from."""

    def __init__(
        self, run_dir: Path, cfg: RunConfig, *, config_yaml: str, resume: dict[str, Any] | None = None, stream: TextIO | None = None
    ):
        self.run_dir, self.cfg, self.console = run_dir, cfg, Console(stream)
        self.metrics_file = run_dir / "metrics.jsonl"
        self.warnings = 0
        self.recent: list[list[Any]] = []
        (run_dir / "trajectories").mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / "config.yaml", config_yaml)
        point_latest(run_dir)
        if resume:
            drop_after(self.metrics_file, resume["step"])
            for path in (run_dir / "trajectories").glob("step_*.json"):
                if int(path.stem.split("_")[1]) > resume["step"]:
                    path.unlink()
        self.tracker = Tracker(
            run_dir,
            cfg.monitor.wandb,
            project=cfg.monitor.project,
            name=f"{cfg.name}/{run_dir.name}",
            config=asdict(cfg),
            run_id=(resume or {}).get("wandb_id"),
        )
        self.note(f"run folder {run_dir}, W&B {self.tracker.where}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, one row on the console, the same numbers in W&B. Raises ValueError for a key outside the
        sections, which is a programming error."""
        odd = [key for key in metrics if key.partition("/")[0] not in SECTIONS]
        if odd:
            raise ValueError(f"metric {odd[0]} belongs to none of the sections {', '.join(SECTIONS)}")
        values = jsonable(metrics)
        for key in (k for k, v in values.items() if v is None):
            self.warn(f"step {step}: {key} is {metrics[key]}")
        ordered = {key: values[key] for section in SECTIONS for key in values if key.startswith(f"{section}/")}
        append_line(self.metrics_file, record_of({"step": step, **ordered}))
        self.tracker.log(step, {k: v for k, v in ordered.items() if v is not None})
        self.console.row(step, metrics)

    def phase(self, name: str, total: int | None = None) -> Phase:
        """Progress of something long: `with monitor.phase("…", total) as phase: phase.advance()`."""
        return Phase(self.console, name, total)

    def note(self, text: str) -> None:
        self.console.line(text)
        append_line(self.run_dir / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def warn(self, text: str) -> None:
        self.warnings += 1
        self.note(f"warning: {text}")

    def samples(self, step: int, rows: list[SampleRow]) -> None:
        """Keep and show some responses of a step."""
        path = self.run_dir / "trajectories" / f"step_{step:06d}.json"
        write_atomic(path, json.dumps([asdict(row) for row in rows], ensure_ascii=False))
        self.recent += [[step, row.uid, row.prompt, row.response, row.reward, row.advantage, row.tokens, row.steps] for row in rows]
        self.recent = self.recent[-KEPT_SAMPLES:]
        columns = ["step", "uid", "prompt", "response", "reward", "advantage", "tokens", "steps"]
        if step == self.cfg.steps or (self.cfg.eval.every and step % self.cfg.eval.every == 0):
            self.tracker.table(step, columns, self.recent)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must remember."""
        return {"wandb_id": self.tracker.id}

    def finish(self, summary: dict[str, Any], *, status: str) -> None:
        """summary.json, report.html, the end of the W&B run, and where to look next."""
        summary = {"status": status, **summary, "warnings": self.warnings, "versions": versions(), "machine": machine()}
        write_atomic(self.run_dir / "summary.json", json.dumps(summary, indent=1))
        write_report(self.run_dir, summary)
        where = self.tracker.where
        self.tracker.finish(summary, failed=status != "finished")
        if status == "finished":
            start, final = summary["eval_start"], summary["eval_final"]
            self.note(
                f"held-out accuracy {start:.3f} → {final:.3f} in {summary['steps']} steps, {summary['seconds']:.0f} s, "
                f"{summary['tokens_per_s']:.0f} tokens/s, largest parity gap {summary['parity_max_abs_delta']:.1e}"
            )
        self.note(f"report  {self.run_dir / 'report.html'}\nmetrics {self.metrics_file}\nW&B     {where}")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {"platform": platform.platform(), "cpus": os.cpu_count(), "gpu": gpu}
