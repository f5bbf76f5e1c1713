"""Weights & Biases: the same numbers, a table of samples, the configuration. Never the reason for a run to die."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger("rlpipe")


class Tracker:
    """mode: auto (online with a login, else offline), online, offline, disabled (then wandb is not even imported).

    run_id continues a run; without one a new run is made. `id` is what a checkpoint must remember.
    """

    def __init__(self, run_dir: Path, mode: str, *, project: str, name: str, config: dict[str, Any], run_id: str | None):
        self.run: Any = None
        self.id = run_id
        if mode == "disabled":
            return
        for variable, folder in (("WANDB_DIR", "."), ("WANDB_DATA_DIR", "wandb/data"), ("WANDB_CACHE_DIR", "wandb/cache")):
            os.environ.setdefault(variable, str((run_dir / folder).resolve()))
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            if mode == "auto":
                mode = "online" if wandb.api.api_key else "offline"
            mode = "offline" if os.environ.get("WANDB_MODE") == "offline" else mode
            self.run = wandb.init(
                dir=run_dir,
                mode=mode,
                project=project,
                name=name,
                config=config,
                id=run_id or wandb.util.generate_id(),
                resume="allow",
                settings=wandb.Settings(console="off", init_timeout=60),
            )
            self.run.define_metric("*", step_metric="step")
            self.id, self.mode = self.run.id, mode
        except Exception as error:  # a tracker that cannot start must not cost a night's run; everything is in metrics.jsonl too
            log.warning("W&B could not start (%s: %s); going on without it", type(error).__name__, error)
            self.run = None

    @property
    def where(self) -> str:
        if self.run is None:
            return "off"
        return self.run.url if self.mode == "online" else f"offline, {Path(self.run.dir).parent} (wandb sync uploads it)"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.run is not None:
            self.run.log({"step": step, **metrics})

    def table(self, step: int, columns: list[str], rows: list[list[Any]]) -> None:
        """The latest samples; built anew each time, because tables cannot be appended to."""
        if self.run is not None:
            import wandb

            self.run.log({"step": step, "samples": wandb.Table(columns=columns, data=rows)})

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        if self.run is not None:
            self.run.summary.update({k: v for k, v in summary.items() if isinstance(v, (int, float, str))})
            self.run.finish(exit_code=1 if failed else 0)
            self.run = None
