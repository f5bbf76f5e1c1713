"""All ranks of the policy's or the value model's learner as one: split a step, run them together, add up what they report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpipe.checkpoint.fitting import PLAIN, shape
from rlpipe.checkpoint.manifest import Part
from rlpipe.cluster import Placement, first_line, wait
from rlpipe.config import RunConfig
from rlpipe.errors import LearnerLost, RlpipeError, WaitTimeout, WorkerLost
from rlpipe.learner.engine import merge_sums
from rlpipe.learner.exporting import ExportingRanks
from rlpipe.learner.micro_batches import Shard, make_shards
from rlpipe.learner.step import StepPlan
from rlpipe.learner.worker import LearnerWorker, ValueWorker

CONTROL = "control"  # the concurrency group of calls that do not wait for a collective
WRITING = "writing"  # of the one that waits for a checkpoint's files
PING_S = 10.0


class RankGroup:
    """The driver's view of `learner.workers` ranks. A dead rank ends whatever was asked with LearnerLost: the others wait for
    it in a collective, so all of them have to go; `restart` then gives fresh ones, with the weights of the model's folder."""

    role: str
    actor: type

    def __init__(self, cfg: RunConfig, model_folder: str, placement: Placement):
        self.cfg, self.config = cfg, cfg.learner
        self.model_folder, self.placement = model_folder, placement
        self.workers: list = []
        self.start()

    def start(self) -> None:
        """Make the ranks, and let them find each other. Raises LearnerLost if one dies on the way."""
        import ray

        environment = {
            "OMP_NUM_THREADS": str(self.config.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve whatever else runs on the machine, and then themselves
            "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed calls renamed collectives: a line per micro-batch otherwise
        }
        if not self.config.gpus:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        actor = ray.remote(concurrency_groups={CONTROL: 1, WRITING: 1})(self.actor)
        self.workers = [
            actor.options(**self.placement.options(self.role, rank), runtime_env={"env_vars": environment}).remote(
                rank, self.cfg, self.model_folder
            )
            for rank in range(self.config.workers)
        ]
        deadline = self.cfg.cluster.start_timeout_s
        master = self._wait([self.workers[0].address.remote()], f"{self.role} rank 0", deadline)[0]
        starts = [worker.start.remote(master) for worker in self.workers]
        self.parameters: int = self._wait(starts, f"the {self.role}'s ranks and DeepSpeed", deadline)[0]

    def restart(self) -> None:
        """End all ranks and start fresh ones, on whatever nodes have room."""
        self.close()
        self.placement.until_ready(self.cfg.cluster.start_timeout_s, self.role)
        try:
            self.start()
        except RlpipeError:
            raise
        except Exception as error:  # they did start once, so it is not they: a port that was taken meanwhile, say
            raise LearnerLost(f"the {self.role}'s ranks did not start again: {first_line(error)}") from error

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

    def shape(self) -> dict[str, int]:
        """{"workers", "zero_stage"}: what the files of a checkpoint depend on."""
        return shape(self.config)

    def sees(self, folder: str) -> list[tuple[str, str, bool]]:
        """(rank, node, whether it sees the folder), of every rank."""
        found = self._wait([worker.sees.remote(folder) for worker in self.workers], f"a look at {folder}")
        return [(f"rank {rank} of the {self.role}", node, sees) for rank, (node, sees) in enumerate(found)]

    def snapshot(self, folder: str) -> None:
        """Every rank copies its part of a checkpoint, and writes it to `folder`: at once, or while training goes on."""
        self._wait([worker.snapshot.remote(folder) for worker in self.workers], f"the {self.role}'s snapshot for {folder}")

    def written(self, folder: str) -> list[Part]:
        """What every rank wrote, once all of it is on the disk; for a thread beside the one that trains. Raises
        CheckpointError."""
        asked = [worker.written.options(concurrency_group=WRITING).remote(folder) for worker in self.workers]
        return self._wait(asked, f"the {self.role}'s part of {folder}")

    def save(self, folder: str) -> None:
        """Snapshot and wait until it is written."""
        self.snapshot(folder)
        self.written(folder)

    def convert(self, folder: str) -> None:
        """Make the universal checkpoint beside the ranks' files. Raises CheckpointError."""
        self._wait([self.workers[0].convert.remote(folder)], f"a universal checkpoint of {folder}")

    def load(self, folder: str, how: str = PLAIN) -> None:
        """how: see `rlpipe.checkpoint.fitting.way_to_load`. Raises CheckpointError."""
        self._wait([worker.load.remote(folder, how) for worker in self.workers], f"reading {folder}")

    def close(self) -> None:
        import ray

        for worker in self.workers:
            ray.kill(worker)

    def _send(self, call: str, shards: Sequence[Shard]) -> list:
        import ray

        return [getattr(worker, call).remote(ray.put(shard)) for worker, shard in zip(self.workers, shards, strict=True)]

    def sleep(self, keep_weights: bool = False) -> None:
        """Every rank makes room on its GPU; see `RankWorker.sleep`."""
        self._wait([worker.sleep.remote(keep_weights) for worker in self.workers], f"the {self.role}'s ranks to sleep")

    def wake(self) -> None:
        self._wait([worker.wake.remote() for worker in self.workers], f"the {self.role}'s ranks to wake up")

    def usage(self) -> list[dict[str, Any]]:
        """What each rank uses of memory; see `rlpipe.usage`."""
        asked = [worker.usage.options(concurrency_group=CONTROL).remote() for worker in self.workers]
        return self._wait(asked, f"memory in use by the {self.role}")

    def _wait(self, references: list, what: str, timeout_s: float = 0.0) -> list:
        try:
            return wait(references, what=what, timeout_s=timeout_s or self.config.timeout_s)
        except (WorkerLost, WaitTimeout) as error:
            raise LearnerLost(f"{self._who(self._dead())}: {error}") from error
        except RlpipeError:
            raise
        except Exception as error:  # a rank whose peer died sees a broken connection before Ray sees the death
            dead = self._dead()
            if not dead:
                raise
            raise LearnerLost(f"{self._who(dead)} during {what}, and its peers saw: {first_line(error)}") from error

    def _who(self, dead: list[int]) -> str:
        return f"{self.role} rank {', '.join(map(str, dead))} died" if dead else f"{self.role} ranks are silent"

    def _dead(self) -> list[int]:
        """Ranks that no longer answer, all of them asked at once."""
        pings = [worker.pid.options(concurrency_group=CONTROL).remote() for worker in self.workers]
        dead, ends = [], time.monotonic() + PING_S
        for rank, ping in enumerate(pings):
            left = max(0.1, ends - time.monotonic())
            try:
                wait([ping], what=f"a sign of life of {self.role} rank {rank}", timeout_s=left)
            except (WorkerLost, WaitTimeout):
                dead.append(rank)
        return dead


class LearnerGroup(ExportingRanks, RankGroup):
    role, actor = "learner", LearnerWorker

    def train(self, plan: StepPlan) -> tuple[list[dict[str, Any]], tuple[np.ndarray, ...]]:
        """All optimizer updates of a step: one dict an update, `sums` added over ranks; and (learner, rollout, exact, lag) for
        the parity gauge."""
        parts = self._wait(self._send("train", self.shards(plan)), "optimizer updates")
        gauge = tuple(np.concatenate([p[name] for p in parts]) for name in ("learner", "rollout", "exact", "lag"))
        return _merged([part["updates"] for part in parts]), gauge


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
