"""All learner ranks as one: split a step, run them together, add up what they report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpipe.cluster import Placement, wait
from rlpipe.config import RunConfig
from rlpipe.learner.engine import merge_sums
from rlpipe.learner.samples import Sample, make_shards
from rlpipe.learner.worker import LearnerWorker


class LearnerGroup:
    """The driver's view of the learner. A dead rank ends the step with WorkerLost: the others wait for it in a collective."""

    def __init__(self, cfg: RunConfig, model_folder: str, placement: Placement):
        import ray

        self.cfg, self.config = cfg, cfg.learner
        environment = {
            "OMP_NUM_THREADS": str(self.config.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve whatever else runs on the machine, and then themselves
            "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed calls renamed collectives: a line per micro-batch otherwise
        }
        if not self.config.gpus:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        actor = ray.remote(LearnerWorker)
        self.workers = [
            actor.options(**placement.options("learner", rank), runtime_env={"env_vars": environment}).remote(
                rank, cfg, model_folder
            )
            for rank in range(self.config.workers)
        ]
        deadline = cfg.cluster.start_timeout_s
        master = wait([self.workers[0].address.remote()], what="learner rank 0", timeout_s=deadline)[0]
        starts = [worker.start.remote(master) for worker in self.workers]
        self.parameters: int = wait(starts, what="the learner's ranks and DeepSpeed", timeout_s=deadline)[0]

    def score(
        self, samples: Sequence[Sample], updates: Sequence[Sequence[int]], gauge: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Old log-probabilities of a step's samples; returns (learner, rollout, exact) for the parity gauge."""
        import ray

        shards = make_shards(samples, updates, gauge, self.config.token_budget, len(self.workers))
        references = [worker.score.remote(ray.put(shard)) for worker, shard in zip(self.workers, shards, strict=True)]
        parts = self._wait(references, "scoring the step")
        return tuple(np.concatenate([p[name] for p in parts]) for name in ("learner", "rollout", "exact"))

    def update(self) -> list[dict[str, Any]]:
        """The optimizer updates of the step scored last: one dict an update, `sums` added over ranks."""
        ranks = self._wait([worker.update.remote() for worker in self.workers], "optimizer updates")
        merged = []
        for parts in zip(*ranks, strict=True):
            sums: dict[str, float] = {}
            for part in parts:
                merge_sums(sums, part["sums"])
            merged.append({"sums": sums, "grad_norm": parts[0]["grad_norm"], "lr": parts[0]["lr"]})
        return merged

    def export(self, version: int):
        """(Manifest, bucket references) of the current weights."""
        return self._wait([worker.export.remote(version) for worker in self.workers], "weight export")[0]

    def save(self, folder: str) -> None:
        self._wait([worker.save.remote(folder) for worker in self.workers], f"writing {folder}")

    def load(self, folder: str) -> None:
        self._wait([worker.load.remote(folder) for worker in self.workers], f"reading {folder}")

    def close(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)

    def _wait(self, references: list, what: str) -> list:
        return wait(references, what=what, timeout_s=self.config.timeout_s)
