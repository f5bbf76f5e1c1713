"""The last lines of a run's console: before and after, what it cost, where to look next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpipe.monitor.incidents import fault_line
from rlpipe.monitor.timeline import NAME as TIMELINE


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
    faults = fault_line(summary.get("cluster", {}))
    if faults:
        lines.append(f"  faults              {faults}")
    if summary["warnings"]:
        lines.append(f"  warnings            {summary['warnings']}, see {run_dir / 'log.txt'}")
    lines.append("look next:")
    if summary.get("model"):
        lines.append(f"  model               {summary['model']}")
    lines.append(f"  report              {run_dir / 'report.html'}")
    lines.append(f"  metrics             {run_dir / 'metrics.jsonl'}")
    if (run_dir / TIMELINE).exists():
        lines.append(f"  timeline            {run_dir / TIMELINE} (chrome://tracing, ui.perfetto.dev)")
    if wandb_where:
        lines.append(f"  W&B                 {wandb_where}")
    if status != "finished":
        lines.append("  continue            the same command with resume=auto, if a checkpoint was written")
    return lines
