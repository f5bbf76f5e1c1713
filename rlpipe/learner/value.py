"""The value model's updates: values of the states that a step trains on, and regression on their returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rlpipe.checkpoint.fitting import EXPORT, PLAIN
from rlpipe.config import LearnerConfig, ValueConfig
from rlpipe.learner.batches import Batches, is_filler
from rlpipe.learner.engine import Engine
from rlpipe.learner.micro_batches import Shard
from rlpipe.learner.snapshot import buffers_of
from rlpipe.models.loading import load_model, save_model
from rlpipe.models.value import HEAD_FILE, ValueModel
from rlpipe.objectives.losses import value_loss

TAG = "value"


class ValueLearner:
    """model: on its device already. Used in turns: `score` a step's samples, then `train` on the same samples with returns."""

    def __init__(self, model: ValueModel, value: ValueConfig, config: LearnerConfig, total_updates: int):
        self.value, self.spec = value, model.spec
        self.engine = Engine(model, config, value.lr, total_updates, TAG)

    @torch.no_grad()
    def score(self, shard: Shard) -> list[np.ndarray]:
        """Values float32[M] of every sample of the shard's updates, in the order of its samples; empty for the others."""
        self.engine.module.eval()
        batches = Batches(shard.samples, self.spec, self.engine.device)
        found = [np.zeros(0, np.float32)] * len(batches.samples)
        for batch in [batch for update in shard.updates for batch in update]:
            values = self._forward(batches, batch).cpu()
            if not is_filler(batch):
                sizes = [batches.samples[i].num_scored for i in batch]
                for index, part in zip(batch, values.split(sizes), strict=True):
                    found[index] = part.numpy()
        self.old = found
        return found

    def train(self, shard: Shard, epochs: int) -> list[dict[str, Any]]:
        """All optimizer updates of a step, after `score` of the same shard; its samples now carry `returns`."""
        batches = Batches(shard.samples, self.spec, self.engine.device)
        self.engine.module.train()
        run = lambda batch: self._loss(batches, batch)  # noqa: E731
        return [self.engine.update(update, run) for _ in range(epochs) for update in shard.updates]

    def _loss(self, batches: Batches, batch: list[int]) -> tuple[torch.Tensor, dict[str, float]]:
        values = self._forward(batches, batch)
        if is_filler(batch):
            return (values * 0.0).sum(), {}
        returns, weight = batches.column(batch, "returns"), batches.column(batch, "policy_weight")
        old = torch.from_numpy(np.concatenate([self.old[i] for i in batch])).to(values.device)
        loss = (weight * value_loss(values, old, returns, self.value.clip)).sum()
        return loss, {"value_loss": float(loss.detach()), "value_tokens": float(len(values))}

    def _forward(self, batches: Batches, batch: list[int]) -> torch.Tensor:
        packed = batches.packed(batch)
        values = self.engine.module(packed.input_ids, packed.position_ids, packed.plan(), packed.index)
        return values[packed.slot.argsort()]

    def snapshot(self, folder: Path, tokenizer) -> None:
        """All ranks hand their part of a checkpoint to the engine's writer: DeepSpeed's state and a Hugging Face folder
        `value_model` with the head beside the weights."""
        self.engine.snapshot(folder)
        self.snapshot_model(folder / "value_model", tokenizer)

    def snapshot_model(self, folder: Path, tokenizer) -> None:
        with self.engine.gathered(list(self.engine.model.head.parameters())):
            head = {name: tensor.detach().cpu().clone() for name, tensor in self.engine.model.head.state_dict().items()}

        buffers = buffers_of(self.engine.model.lm)

        def write(weights) -> None:
            save_model(self.engine.model, tokenizer, folder, weights, buffers=buffers)
            save_file(head, folder / HEAD_FILE)

        self.engine.snapshot_model(folder, write)

    def save(self, folder: Path) -> None:
        """All ranks write their part, now. Raises CheckpointError if the disk refuses."""
        self.engine.save(folder)

    def save_model(self, folder: Path, tokenizer) -> None:
        """A Hugging Face folder with the value head beside the weights, written by rank 0, now; all ranks must call it."""
        self.snapshot_model(folder, tokenizer)
        self.engine.writer.finish()

    def load(self, folder: Path, how: str = PLAIN) -> None:
        """how: see `rlpipe.checkpoint.fitting.way_to_load`. Raises CheckpointError."""
        if how == EXPORT:
            self.engine.load_weights(folder, lambda: self._exported(folder / "value_model"))
        else:
            self.engine.load(folder, how)

    def _exported(self, folder: Path) -> dict[str, torch.Tensor]:
        model = ValueModel(load_model(folder, str(self.engine.model.lm.dtype).removeprefix("torch.")))
        model.load_head(folder)
        return dict(model.named_parameters())
