"""All ranks of the policy's or the value model's learner as one: split a step, run them together, add up what they report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpipe.cluster import Placement, wait
from rlpipe.config import RunConfig
from rlpipe.learner.engine import merge_sums
from rlpipe.learner.micro_batches import Shard, make_shards
from rlpipe.learner.step import StepPlan
from rlpipe.learner.worker import LearnerWorker, ValueWorker


class RankGroup:
    """The driver's view of `learner.workers` ranks. A dead rank ends the step with WorkerLost: the others wait for it in a
    collective."""

    role: str
    actor: type

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
        actor = ray.remote(self.actor)
        self.workers = [
            actor.options(**placement.options(self.role, rank), runtime_env={"env_vars": environment}).remote(
                rank, cfg, model_folder
            )
            for rank in range(self.config.workers)
        ]
        deadline = cfg.cluster.start_timeout_s
        master = wait([self.workers[0].address.remote()], what=f"{self.role} rank 0", timeout_s=deadline)[0]
        starts = [worker.start.remote(master) for worker in self.workers]
        self.parameters: int = wait(starts, what=f"the {self.role}'s ranks and DeepSpeed", timeout_s=deadline)[0]

    def shards(self, plan: StepPlan) -> list[Shard]:
        """The ranks' parts of a step: the same for every group of ranks."""
        return make_shards(plan.samples, plan.updates, plan.gauge, self.config.token_budget, len(self.workers))

    def score(self, plan: StepPlan) -> list[np.ndarray]:
        """What the model says of every sample of the step's updates, float32[M] in the plan's order; empty for the others. A
        policy: log-probabilities, a value model: values."""
        shards = self.shards(plan)
        parts = self._wait(self._send("score", shards), f"scoring by the {self.role}")
        found = [np.zeros(0, np.float32)] * len(plan.samples)
        for shard, part in zip(shards, parts, strict=True):
            for index, scores in zip(shard.places, part, strict=True):
                if len(scores):
                    found[index] = scores
        return found

    def save(self, folder: str) -> None:
        self._wait([worker.save.remote(folder) for worker in self.workers], f"writing {folder}")

    def load(self, folder: str) -> None:
        self._wait([worker.load.remote(folder) for worker in self.workers], f"reading {folder}")

    def close(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)

    def _send(self, call: str, shards: Sequence[Shard]) -> list:
        import ray

        return [getattr(worker, call).remote(ray.put(shard)) for worker, shard in zip(self.workers, shards, strict=True)]

    def _wait(self, references: list, what: str) -> list:
        return wait(references, what=what, timeout_s=self.config.timeout_s)


class LearnerGroup(RankGroup):
    role, actor = "learner", LearnerWorker

    def train(self, plan: StepPlan) -> tuple[list[dict[str, Any]], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All optimizer updates of a step: one dict an update, `sums` added over ranks; and (learner, rollout, exact) for the
        parity gauge."""
        parts = self._wait(self._send("train", self.shards(plan)), "optimizer updates")
        gauge = tuple(np.concatenate([p[name] for p in parts]) for name in ("learner", "rollout", "exact"))
        return _merged([part["updates"] for part in parts]), gauge

    def export(self, version: int):
        """(Manifest, bucket references) of the current weights."""
        return self._wait([worker.export.remote(version) for worker in self.workers], "weight export")[0]


class ValueGroup(RankGroup):
    role, actor = "value", ValueWorker

    def start_training(self, plan: StepPlan) -> list:
        """Set off the updates of the step scored last, whose samples now have returns; hand the result to `finish_training`."""
        return self._send("train", self.shards(plan))

    def finish_training(self, pending: list) -> list[dict[str, Any]]:
        """One dict an update, `sums` added over ranks."""
        return _merged(self._wait(pending, "value updates"))


def _merged(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    merged = []
    for parts in zip(*ranks, strict=True):
        sums: dict[str, float] = {}
        for part in parts:
            merge_sums(sums, part["sums"])
        merged.append({"sums": sums, "grad_norm": parts[0]["grad_norm"], "lr": parts[0]["lr"]})
    return merged
