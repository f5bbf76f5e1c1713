"""The actor around one learner rank."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from rlpipe.config import RunConfig
from rlpipe.learner.engine import DeepSpeedLearner, join_process_group
from rlpipe.learner.samples import Shard
from rlpipe.models.loading import load_model, load_tokenizer
from rlpipe.models.weights import Manifest, checksum
from rlpipe.objectives.objective import build_objective


class LearnerWorker:
    """Waits for: its peers, inside collectives. Consumes: shards of samples. Produces: statistics and weights.

    All ranks must be called in the same order; `LearnerGroup` does.
    """

    def __init__(self, rank: int, cfg: RunConfig, model_folder: str):
        torch.set_num_threads(cfg.learner.threads)
        self.rank, self.cfg, self.model_folder = rank, cfg, model_folder
        self.shard: Shard | None = None

    def pid(self) -> int:
        return os.getpid()

    def address(self) -> str:
        """'host:port' free on this node, for rank 0 to be found at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, master: str) -> int:
        """Join the process group and hand the model to DeepSpeed; returns the number of parameters."""
        cfg = self.cfg
        join_process_group(self.rank, cfg.learner.workers, master, cfg.learner.timeout_s)
        model = load_model(self.model_folder, cfg.model.dtype, cfg.model.block_size)
        parameters = sum(p.numel() for p in model.parameters())
        if torch.cuda.is_available():
            model = model.cuda()
        updates = cfg.steps * cfg.algo.updates_per_step * cfg.algo.epochs
        self.learner = DeepSpeedLearner(
            model,
            build_objective(cfg.algo, cfg.rollout.decoder.max_tokens),
            cfg.learner,
            cfg.rollout.decoder.temperature,
            updates,
        )
        return parameters

    def score(self, shard: Shard):
        self.shard = shard
        return self.learner.score(shard)

    def update(self) -> list[dict]:
        return self.learner.update(self.shard, self.cfg.algo.epochs)

    def export(self, version: int):
        """(Manifest, references to the buckets) on rank 0, None elsewhere."""
        import ray

        buckets, references, entries = [], [], []
        for bucket, part in self.learner.export(self.cfg.learner.bucket_mb * 2**20):
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
