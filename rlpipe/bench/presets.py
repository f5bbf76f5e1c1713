"""`python -m rlpipe.bench presets [key=value …]`: methods on one task, with the same seeds and number of steps, in one table.

Each run is `python -m rlpipe.run` with the recipe and `algo.preset`, in a process of its own, one after the other. One that is
already there (`output_dir`, same settings) is not repeated, so an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.bench.settings import PresetSettings, read
from rlpipe.errors import ConfigError
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.objective_presets import ALGO_PRESETS


@dataclass(slots=True)
class Row:
    """start, final: accuracy by seed · seconds: of training, by seed · failures: what ended a run early, by seed."""

    preset: str
    start: list[float]
    final: list[float]
    seconds: list[float]
    failures: list[str]

    @property
    def gains(self) -> list[float]:
        return [final - start for start, final in zip(self.start, self.final, strict=True)]


def main(arguments: Sequence[str]) -> None:
    """Run what is missing, print the table, write `out`. Raises ConfigError before anything runs."""
    settings = read(arguments, PresetSettings)
    names = list(ALGO_PRESETS) if settings.presets == "all" else settings.presets.split(",")
    unknown = [name for name in names if name not in ALGO_PRESETS]
    if unknown:
        raise ConfigError(f"presets={settings.presets}: there is no {unknown[0]}; known are {', '.join(ALGO_PRESETS)}")
    rows = []
    for name in names:
        row = Row(name, [], [], [], [])
        for seed in range(settings.seeds):
            found = _run(settings, name, seed)
            said = found if isinstance(found, str) else f"{found['eval_start']:.3f} -> {found['eval_final']:.3f}"
            print(f"{name} seed {seed}: {said}", flush=True)
            if isinstance(found, str):
                row.failures.append(found)
                continue
            row.start.append(found["eval_start"])
            row.final.append(found["eval_final"])
            row.seconds.append(found["seconds"])
        rows.append(row)
    show(rows, settings)
    if settings.out:
        report = {"settings": dataclasses.asdict(settings)}
        report["rows"] = [dataclasses.asdict(row) for row in rows]
        report |= {"machine": machine_facts(), "versions": package_versions()}
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")


def _run(settings: PresetSettings, preset: str, seed: int) -> dict[str, Any] | str:
    """The summary of a run, or how it failed: its last line."""
    run_id = f"{preset}-{seed}"
    folder = Path(settings.output_dir) / settings.recipe / run_id
    summary = folder / "summary.json"
    command = [sys.executable, "-m", "rlpipe.run", f"recipe={settings.recipe}", f"algo.preset={preset}", f"seed={seed}"]
    command += [f"steps={settings.steps}", f"output_dir={settings.output_dir}", f"run_id={run_id}", "eval.every=0"]
    command += ["checkpoint.every=0", "monitor.wandb=disabled", "monitor.samples=0", *settings.set.split()]
    if not summary.is_file():
        log = Path(settings.output_dir) / f"{run_id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf8") as console:
            subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, check=False)
        if not summary.is_file():
            return log.read_text(encoding="utf8").strip().splitlines()[-1]
    found = json.loads(summary.read_text(encoding="utf8"))
    return found if found.get("eval_final") is not None else str(found.get("error", found.get("status", "no accuracy")))


def show(rows: Sequence[Row], settings: PresetSettings) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("preset", "before", "after", "gain", "by seed", "s/step", "failed")
    for row in rows:
        if not row.final:
            table.add_row(row.preset, *[""] * 5, row.failures[0][:60])
            continue
        mean = [f"{statistics.mean(values):.3f}" for values in (row.start, row.final)]
        gains = " ".join(f"{gain:+.3f}" for gain in row.gains)
        per_step = statistics.mean(row.seconds) / settings.steps
        failed = str(len(row.failures)) if row.failures else ""
        table.add_row(row.preset, *mean, f"{statistics.mean(row.gains):+.3f}", gains, f"{per_step:.2f}", failed)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
