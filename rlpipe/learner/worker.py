"""The actors around one rank of the policy's and of the value model's learner."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch

from rlpipe.checkpoint.fitting import PLAIN
from rlpipe.checkpoint.manifest import Part
from rlpipe.config import RunConfig
from rlpipe.errors import CheckpointError
from rlpipe.learner.engine import join_process_group
from rlpipe.learner.exporting import Exporter, ExportingRank
from rlpipe.learner.micro_batches import Shard
from rlpipe.learner.offloading import Offload
from rlpipe.learner.policy import PolicyLearner
from rlpipe.learner.sharding import Partitioned, whole_size
from rlpipe.learner.step import draws_and_passes
from rlpipe.learner.value import ValueLearner
from rlpipe.models.adapters import add_adapters
from rlpipe.models.loading import check_same_tokens, load_model, load_tokenizer, settings_of
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.value import ValueModel
from rlpipe.objectives.objective import build_objective
from rlpipe.usage import usage


class RankWorker:
    """Waits for: its peers, inside collectives. Consumes: shards of samples. Produces: statistics and weights.

    All ranks must be called in the same order; `RankGroup` does.
    """

    def __init__(self, rank: int, cfg: RunConfig, model_folder: str):
        torch.set_num_threads(cfg.learner.threads)
        self.rank, self.cfg, self.model_folder = rank, cfg, model_folder
        self.offload = Offload()
        self.snapshot_of = ""  # the folder that the newest snapshot goes to

    def pid(self) -> int:
        return os.getpid()

    def usage(self) -> dict[str, Any]:
        return usage()

    def sleep(self, keep_weights: bool = False) -> int:
        """Move what lies on the GPU to host memory, all or all but the weights; returns the bytes."""
        engine = self.learner.engine
        if engine.device.type == "cpu":
            return 0
        return self.offload.sleep(self.learner, engine.device, list(engine.model.parameters()) if keep_weights else ())

    def wake(self) -> int:
        return self.offload.wake()

    def address(self) -> str:
        """'host:port' free on this node, for rank 0 to be found at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def sees(self, folder: str) -> tuple[str, bool]:
        """(this node's address, whether the folder is there)."""
        import ray

        return ray.util.get_node_ip_address(), Path(folder).is_dir()

    def snapshot(self, folder: str) -> None:
        """Copy this rank's part of a checkpoint, and write it under `folder`: at once, or while other calls run."""
        writer = self.learner.engine.writer
        writer.forget()
        writer.background, self.snapshot_of = self.cfg.checkpoint.background, folder
        self.learner.snapshot(Path(folder), load_tokenizer(self.model_folder))

    def written(self, folder: str) -> Part:
        """Wait until the snapshot is on the disk; runs beside other calls. Raises CheckpointError if it cannot be."""
        import ray

        if self.snapshot_of != folder:
            raise CheckpointError(f"rank {self.rank} started anew since the snapshot for {folder}, and holds it no more")
        files = self.learner.engine.writer.finish()
        relative = {path.relative_to(folder).as_posix(): known for path, known in files.items()}
        rank = f"rank {self.rank} of the {self.learner.engine.name}"
        return Part(rank, ray.util.get_node_ip_address(), relative)

    def convert(self, folder: str) -> None:
        self.learner.engine.convert(Path(folder))

    def load(self, folder: str, how: str = PLAIN) -> None:
        self.learner.load(Path(folder), how)

    @property
    def total_updates(self) -> int:
        return self.cfg.steps * self.cfg.algo.updates_per_step * self.cfg.algo.epochs

    def _load(self, master: str, folder: str) -> DiffusionLM:
        cfg = self.cfg
        join_process_group(self.rank, cfg.learner.workers, master, cfg.learner.timeout_s)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        partitioning = Partitioned(cfg.learner) if cfg.learner.zero_stage == 3 else None
        return load_model(folder, cfg.model.dtype, device=device, partitioning=partitioning, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return settings_of(self.cfg.model) | {"revision": ""}  # of model.path, which is a folder by now; value.path has none


class LearnerWorker(ExportingRank, RankWorker):
    def start(self, master: str) -> int:
        """Join the process group and hand the model to DeepSpeed; returns the number of parameters."""
        cfg, config = self.cfg, self.cfg.learner
        model = self._load(master, self.model_folder)
        parameters = sum(whole_size(p) for p in model.parameters())
        if config.lora_rank:
            add_adapters(
                model.lm,
                rank=config.lora_rank,
                alpha=config.lora_alpha or config.lora_rank,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
            )
        objective = build_objective(cfg.algo, cfg.rollout.decoder.max_tokens)
        temperature = cfg.rollout.decoder.temperature
        self.learner = PolicyLearner(_placed(model), objective, config, temperature, self.total_updates)
        self.exporter = Exporter(self.learner.engine, config.bucket_mb * 2**20)
        return parameters

    def train(self, shard: Shard) -> dict:
        return self.learner.train(shard, draws_and_passes(self.cfg.algo)[1])

    def score(self, shard: Shard):
        return self.learner.score(shard)


class ValueWorker(RankWorker):
    def start(self, master: str) -> int:
        """Join the process group and hand the value model to DeepSpeed; returns the number of parameters."""
        cfg = self.cfg
        folder = cfg.value.path or self.model_folder
        if cfg.value.path:
            check_same_tokens(self.model_folder, folder, **self._settings)
        model = ValueModel(self._load(master, folder))
        model.load_head(model.provenance.folder)
        self.learner = ValueLearner(_placed(model), cfg.value, cfg.learner, self.total_updates)
        return sum(whole_size(p) for p in model.parameters())

    def score(self, shard: Shard):
        return self.learner.score(shard)

    def train(self, shard: Shard) -> list[dict]:
        return self.learner.train(shard, draws_and_passes(self.cfg.algo)[1])


def _placed(model: torch.nn.Module) -> torch.nn.Module:
    return model.cuda() if torch.cuda.is_available() else model
