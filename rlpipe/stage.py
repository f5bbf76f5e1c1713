"""What every training run stands on: its monitor, the cluster and the workers' places, and that all of it ends with the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlpipe import checkpoint, cluster, interruption, recipe
from rlpipe.cluster import Placement, Role
from rlpipe.config import RunConfig
from rlpipe.errors import Interrupted
from rlpipe.monitor.monitor import Monitor

CONFIG = "config.yaml"


class Stage:
    """A context. Entering it opens the run's folder and console; leaving it closes workers, placement and cluster, and says how
    the run ended.

    of_monitor: further arguments of `Monitor`. Raises CheckpointError if `resume_from` is of another configuration.
    """

    def __init__(self, cfg: RunConfig, run_dir: Path, resume_from: Path | None, warnings: Sequence[str], **of_monitor: Any):
        self.cfg, self.warnings, self.status = cfg, warnings, "failed"
        self.driver: Any = None
        self.placement: Placement | None = None
        saved = checkpoint.read_state(resume_from) if resume_from else None
        if saved:
            # Another number of ranks, or ZeRO stage, can load it; so these two are compared with themselves.
            same = replace(cfg, learner=replace(cfg.learner, **saved["learner"]))
            of_run = next(path for path in (resume_from / CONFIG, run_dir / CONFIG) if path.exists() or path.parent == run_dir)
            changes = recipe.differences(recipe.load([f"recipe={of_run}"]), same)
            checkpoint.check_fits(resume_from, saved, fingerprint=recipe.fingerprint(same), changes=changes)
        state = {"step": saved["step"], **saved["monitor"]} if saved else None
        self.monitor = Monitor(run_dir, cfg, config_yaml=recipe.to_yaml(cfg), resume=state, **of_monitor)

    def __enter__(self) -> Stage:
        if self.cfg.description:
            self.monitor.note(self.cfg.description.strip())
        for warning in self.warnings:
            self.monitor.warn(warning)
        return self

    def connect(self, needed: Sequence[Role]) -> None:
        """Join or start the cluster. Raises ClusterError, with the arithmetic, if it can never hold the roles."""
        cluster.connect(
            self.cfg.cluster,
            need_cpus=sum(role.workers * role.cpus for role in needed),
            need_gpus=sum(role.workers * role.gpus for role in needed),
        )
        interruption.install()  # Ray puts a handler of its own there, which ends the process without a word
        cluster.preflight(needed)

    def place(self, needed: Sequence[Role]) -> Placement:
        """Room for all workers of the roles, or ClusterError."""
        self.placement = cluster.place(needed, self.cfg.cluster.start_timeout_s)
        return self.placement

    def run(self, driver: Any) -> None:
        """To the last step; the summary goes into the run's folder."""
        self.driver = driver
        summary = driver.run()
        self.status = "finished"
        self.monitor.finish(summary, status=self.status)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is not None and issubclass(kind, (Interrupted, KeyboardInterrupt)):
            self.status = "interrupted"
        if self.status != "finished":
            self.monitor.finish(self.driver.summary() if self.driver else {}, status=self.status)
        if self.driver is not None:
            self.driver.close()
        if self.placement is not None:
            self.placement.remove()
        cluster.disconnect()
