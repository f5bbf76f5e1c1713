"""The policy under DeepSpeed: scoring, updating, exporting. One object a rank; knows nothing of Ray.

DeepSpeed owns sharding, optimizer and checkpoints. Three things are ours on purpose: the process group (made before
DeepSpeed, so that its address and deadline are explicit), the accumulation boundary (DeepSpeed with accumulation 1 would keep
only the last micro-batch at ZeRO 1 and 2, without an error), and the learning rate (set before every update from the count of
updates, so that resuming needs no scheduler state).
"""

from __future__ import annotations

import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlpipe.config import LearnerConfig
from rlpipe.errors import CheckpointError, RlpipeError
from rlpipe.learner.samples import Samples, Shard
from rlpipe.models.loading import save_model
from rlpipe.models.packing import PackedBatch, collate, pack_rows
from rlpipe.models.policy import DiffusionLM
from rlpipe.models.weights import Entry, fill_bucket, split_buckets, tensor_of
from rlpipe.objectives.objective import Objective

TAG = "learner"  # of a DeepSpeed checkpoint inside its folder
EXPORT_BUCKET_BYTES = 256 * 2**20


def join_process_group(rank: int, world: int, master: str, timeout_s: float) -> None:
    """gloo on CPU, nccl on GPU; master is 'host:port'. Must come before `DeepSpeedLearner`."""
    host, port = master.rsplit(":", 1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=port)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.distributed.init_process_group(
        backend, init_method=f"tcp://{master}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def _import_deepspeed():
    """DeepSpeed without its shared-memory op, which it would compile on first use and which can hang for ever."""
    import deepspeed
    import deepspeed.ops

    if "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


class DeepSpeedLearner:
    """model: on its device already. objective: the loss. temperature: of the sampler, so that ratios compare like with like."""

    def __init__(self, model: DiffusionLM, objective: Objective, config: LearnerConfig, temperature: float, total_updates: int):
        self.deepspeed = _import_deepspeed()
        self.objective, self.config = objective, config
        self.temperature, self.total_updates = temperature, total_updates
        self.spec = model.spec
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.updates_done = 0
        if config.activation_checkpointing:
            model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=tuple(config.betas),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.engine, self.optimizer, _, _ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, model.lm.dtype), dist_init_required=False
        )
        self.begin(Samples.of([]))

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def begin(self, samples: Samples) -> None:
        """Pack the samples of a step. Everything afterwards refers to them by index."""
        self.samples = list(samples)
        self.packs = [self._pack(sample) for sample in self.samples]
        self.old_logp = [torch.full((sample.num_scored,), float("nan")) for sample in self.samples]

    @torch.no_grad()
    def score(self, shard: Shard) -> dict[str, np.ndarray]:
        """Log-probabilities of every sample before any update; kept as the denominators of the ratios.

        Returns the parity gauge's raw material, flat over the scored tokens whose state the rollout shared: `learner` and
        `rollout` log-probabilities (float32) and whether they should agree, `exact` (bool).
        """
        self.engine.eval()
        self.begin(shard.samples)
        for batch in [batch for update in shard.updates for batch in update] + shard.gauge:
            logp, _ = self._forward(batch)
            if not is_filler(batch):
                self._remember(batch, logp)
        known = [~np.isnan(sample.rollout_logp) for sample in self.samples]
        pairs = list(zip(known, self.old_logp, self.samples, strict=True))
        return {
            "learner": np.concatenate([old.numpy()[mask] for mask, old, _ in pairs] or [np.zeros(0, np.float32)]),
            "rollout": np.concatenate([s.rollout_logp[mask] for mask, _, s in pairs] or [np.zeros(0, np.float32)]),
            "exact": np.concatenate([np.full(mask.sum(), s.exact) for mask, _, s in pairs] or [np.zeros(0, bool)]),
        }

    def update(self, shard: Shard, epochs: int) -> list[dict[str, Any]]:
        """All optimizer updates of a step, after `score`. Returns one dict an update: additive `sums` of this rank (see
        `Objective.loss`), and `grad_norm`, `lr`, equal on all ranks."""
        self.engine.train()
        return [self._update(micro_batches) for _ in range(epochs) for micro_batches in shard.updates]

    def _update(self, micro_batches: list[list[int]]) -> dict[str, Any]:
        before = self.engine.global_steps
        rate = learning_rate(self.config, self.updates_done, self.total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        for place, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(place == len(micro_batches) - 1)
            loss, batch_sums = self._loss(batch)
            self.engine.backward(loss * self.world)  # DeepSpeed averages gradients over ranks; our losses add up
            norm = self._plain_norm() if self.config.zero_stage == 0 else None
            self.engine.step()
            merge_sums(sums, batch_sums)
        if self.engine.global_steps != before + 1:
            raise RlpipeError(f"an update made {self.engine.global_steps - before} optimizer steps instead of one")
        self.updates_done += 1
        return {"sums": sums, "grad_norm": float(norm or self.engine.get_global_grad_norm()), "lr": rate}

    def _plain_norm(self) -> torch.Tensor:
        """Norm of the reduced gradients before clipping; without ZeRO DeepSpeed does not keep it."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])

    def _loss(self, batch: list[int]) -> tuple[torch.Tensor, dict[str, float]]:
        logp, entropy = self._forward(batch)
        if is_filler(batch):  # the pass happens, so that collectives match on all ranks, and adds exactly nothing
            return (logp * 0.0).sum(), {}
        column = lambda name: torch.from_numpy(  # noqa: E731
            np.concatenate([getattr(self.samples[i], name) for i in batch])
        ).to(logp.device)
        terms = self.objective.loss(
            logp,
            torch.cat([self.old_logp[i] for i in batch]).to(logp.device),
            column("advantage"),
            column("policy_weight"),
            column("kl_weight"),
            entropy=entropy,
            behaviour_logp=self._behaviour(batch).to(logp.device),
        )
        return terms.loss, {name: float(value) for name, value in terms.sums.items()}

    def _behaviour(self, batch: list[int]) -> torch.Tensor:
        """float32 [M]: what the sampler recorded where it drew from another distribution than the learner's, NaN elsewhere."""
        held = [self.samples[i] for i in batch]
        return torch.from_numpy(np.concatenate([np.where(s.exact, np.float32("nan"), s.rollout_logp) for s in held]))

    def _pack(self, sample):
        packs = pack_rows(
            sample.prompt_ids,
            sample.response_ids,
            sample.masked,
            sample.scored,
            block_size=sample.block_size,
            mask_id=self.spec.mask_token_id,
            logit_shift=self.spec.logit_shift,
            targets=sample.targets if sample.targets.size else None,
        )
        if len(packs) != 1:
            raise ValueError(f"a sample must pack into one sequence, this one gives {len(packs)}")
        return packs[0]

    def _forward(self, batch: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies [M] of the batch's scored tokens, sample after sample."""
        indices = [i if i >= 0 else ~i for i in batch]
        offsets = np.cumsum([0] + [self.samples[i].num_scored for i in indices])
        slots = [self.packs[i].slot + start for i, start in zip(indices, offsets[:-1], strict=True)]
        packed: PackedBatch = collate([self.packs[i] for i in indices], slots, self.spec.mask_token_id).to(self.device)
        logp, entropy = self.engine(
            packed.input_ids, packed.position_ids, packed.plan(), packed.index, packed.targets, self.temperature
        )
        order = packed.slot.argsort()
        return logp[order], entropy[order]

    def _remember(self, batch: list[int], logp: torch.Tensor) -> None:
        sizes = [self.samples[i].num_scored for i in batch]
        for index, values in zip(batch, logp.float().cpu().split(sizes), strict=True):
            self.old_logp[index] = values.clone()

    def export(self, bucket_bytes: int):
        """Yield (bucket uint8 [n], entries) of the model's weights on rank 0, (None, []) elsewhere.

        At ZeRO 3 each bucket is gathered by itself, so no rank ever holds a second copy of the model; all ranks must iterate.
        """
        stage3 = self.config.zero_stage == 3
        named = list(self.engine.module.lm.named_parameters())
        sizes = [(p.ds_numel if stage3 else p.numel()) * p.element_size() for _, p in named]
        for number, indices in enumerate(split_buckets(sizes, bucket_bytes)):
            chosen = [named[i] for i in indices]
            with self.deepspeed.zero.GatheredParameters([p for _, p in chosen], enabled=stage3):
                packed: tuple[np.ndarray | None, list[Entry]] = (None, [])
                if self.rank == 0:
                    packed = fill_bucket(chosen, number)
            yield packed

    def save(self, folder: Path) -> None:
        """All ranks write their part. Raises CheckpointError if the disk refuses."""
        try:
            self.engine.save_checkpoint(str(folder), tag=TAG, client_state={"updates_done": self.updates_done})
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"rank {self.rank} could not write its checkpoint to {folder}: {error}. Free some space; the last complete "
                "checkpoint is untouched, and resume=auto continues from it"
            ) from error

    def save_model(self, folder: Path, tokenizer) -> None:
        """A Hugging Face folder with the current weights, written by rank 0; all ranks must call it."""
        state: dict[str, torch.Tensor] = {}
        for bucket, entries in self.export(EXPORT_BUCKET_BYTES):
            state.update((entry.name, tensor_of(entry, bucket)) for entry in entries)
        if self.rank == 0:
            try:
                save_model(self.engine.module, tokenizer, folder, state)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"the model could not be written to {folder}: {error}. Free some space") from error

    def load(self, folder: Path) -> None:
        """Raises CheckpointError if the checkpoint is unreadable or was written by another number of ranks."""
        try:
            path, state = self.engine.load_checkpoint(str(folder), tag=TAG)
        except Exception as error:
            raise CheckpointError(
                f"{folder} could not be loaded with {self.world} learner ranks at ZeRO {self.config.zero_stage}: {error}"
            ) from error
        if path is None:
            raise CheckpointError(f"{folder} holds no learner checkpoint")
        self.updates_done = state["updates_done"]


def is_filler(batch: list[int]) -> bool:
    return batch[0] < 0


def merge_sums(total: dict[str, float], part: dict[str, float]) -> None:
    """Add `part` into `total`; names starting with `max_` keep the largest."""
    for name, value in part.items():
        if name.startswith("max_"):
            total[name] = max(total.get(name, -math.inf), value)
        else:
            total[name] = total.get(name, 0.0) + value


def learning_rate(config: LearnerConfig, update: int, total: int) -> float:
    """Rate of the given 0-based optimizer update: linear warm-up, then constant, linear to 0 or cosine to 0 over `total`."""
    if update < config.lr_warmup:
        return config.lr * (update + 1) / config.lr_warmup
    done = min(1.0, (update - config.lr_warmup) / max(1, total - config.lr_warmup))
    if config.lr_schedule == "linear":
        return config.lr * (1.0 - done)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr


def deepspeed_config(config: LearnerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation stays 1: the boundary is set by hand, see the module's docstring."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW works offloaded; DeepSpeed's would be compiled on the spot
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }
