"""The actors around one rank of the policy's and of the value model's learner."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch

from rlpipe.config import RunConfig
from rlpipe.learner.engine import join_process_group
from rlpipe.learner.micro_batches import Shard
from rlpipe.learner.policy import PolicyLearner
from rlpipe.learner.sharding import Partitioned, whole_size
from rlpipe.learner.step import draws_and_passes
from rlpipe.learner.value import ValueLearner
from rlpipe.models.adapters import add_adapters
from rlpipe.models.loading import check_same_tokens, load_model, load_tokenizer, settings_of
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.value import ValueModel
from rlpipe.models.weights import Manifest, checksum
from rlpipe.objectives.objective import build_objective


class RankWorker:
    """Waits for: its peers, inside collectives. Consumes: shards of samples. Produces: statistics and weights.

    All ranks must be called in the same order; `RankGroup` does.
    """

    def __init__(self, rank: int, cfg: RunConfig, model_folder: str):
        torch.set_num_threads(cfg.learner.threads)
        self.rank, self.cfg, self.model_folder = rank, cfg, model_folder

    def pid(self) -> int:
        return os.getpid()

    def address(self) -> str:
        """'host:port' free on this node, for rank 0 to be found at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

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


class LearnerWorker(RankWorker):
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
        return parameters

    def train(self, shard: Shard) -> dict:
        return self.learner.train(shard, draws_and_passes(self.cfg.algo)[1])

    def score(self, shard: Shard):
        return self.learner.score(shard)

    def export(self, version: int):
        """(Manifest, references to the buckets) on rank 0, None elsewhere."""
        import ray

        buckets, references, entries = [], [], []
        for bucket, part in self.learner.engine.export(self.cfg.learner.bucket_mb * 2**20):
            if bucket is not None:
                buckets.append(bucket)
                references.append(ray.put(bucket))
                entries += part
        if self.rank:
            return None
        return Manifest(version, tuple(entries), checksum(buckets)), references

    def save(self, folder: str) -> None:
        """This rank's part of a checkpoint under folder/learner; rank 0 also writes a Hugging Face folder, folder/model."""
        self.learner.save(Path(folder))
        self.learner.save_model(Path(folder) / "model", load_tokenizer(self.model_folder))

    def load(self, folder: str) -> None:
        self.learner.load(Path(folder))


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

    def save(self, folder: str) -> None:
        """This rank's part of a checkpoint under folder/value; rank 0 also writes a folder for `value.path`."""
        self.learner.save(Path(folder))
        self.learner.save_model(Path(folder) / "value_model", load_tokenizer(self.model_folder))

    def load(self, folder: str) -> None:
        self.learner.load(Path(folder))


def _placed(model: torch.nn.Module) -> torch.nn.Module:
    return model.cuda() if torch.cuda.is_available() else model
