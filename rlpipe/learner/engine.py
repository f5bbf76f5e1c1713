"""A model under DeepSpeed: updating, exporting, saving. One object a rank; knows neither Ray nor what the loss is.

DeepSpeed owns sharding, optimizer and checkpoints. Three things are ours on purpose: the process group (made before
DeepSpeed, so that its address and deadline are explicit), the accumulation boundary (DeepSpeed with accumulation 1 would keep
only the last micro-batch at ZeRO 1 and 2, without an error), and the learning rate (set before every update from the count of
updates, so that resuming needs no scheduler state).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlpipe.checkpoint.fitting import PLAIN, UNIVERSAL
from rlpipe.config import LearnerConfig
from rlpipe.errors import CheckpointError, RlpipeError
from rlpipe.learner.reshaping import (
    adapters_of,
    convert,
    read_adapters,
    read_progress,
    set_weights,
    universal,
    universal_of,
    write_progress,
)
from rlpipe.learner.snapshot import Writer, checkpoint_engine
from rlpipe.models.adapters import Merged, merged_parameters
from rlpipe.models.weights import Entry, Layout, pack, tensor_of

EXPORT_BUCKET_BYTES = 256 * 2**20
Run = Callable[[list[int]], tuple[torch.Tensor, dict[str, float]]]


def join_process_group(rank: int, world: int, master: str, timeout_s: float) -> None:
    """gloo on CPU, nccl on GPU; master is 'host:port'. Must come before `Engine`."""
    host, port = master.rsplit(":", 1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=port)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.distributed.init_process_group(
        backend, init_method=f"tcp://{master}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def import_deepspeed():
    """DeepSpeed without its shared-memory op, which it would compile on first use and which can hang for ever."""
    import deepspeed
    import deepspeed.ops

    if "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


class Engine:
    """model: on its device already, with an `lm` that is exported; parameters without gradient are left alone. lr: of this
    model, scheduled over `total_updates` as config says. name: tag of its checkpoints."""

    def __init__(self, model: nn.Module, config: LearnerConfig, lr: float, total_updates: int, name: str):
        self.deepspeed = import_deepspeed()
        self.config, self.lr, self.total_updates, self.name = config, lr, total_updates, name
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.updates_done = 0
        self.gathers = 0  # of parameters, counted
        if config.activation_checkpointing:
            model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=lr,
            betas=tuple(config.betas),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        settings = deepspeed_config(config, model.lm.dtype)
        self.module, self.optimizer, _, _ = self.deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.writer = Writer(self.rank)
        self.module.checkpoint_engine = checkpoint_engine(self.writer)
        self.module._copy_recovery_script = lambda folder: None  # a write that only rank 0 could fail at

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def model(self) -> nn.Module:
        """What DeepSpeed wraps."""
        return self.module.module

    def update(self, micro_batches: Sequence[list[int]], run: Run) -> dict[str, Any]:
        """One optimizer update. run(micro-batch) → (this rank's share of the loss, additive sums). Returns `sums` of this rank,
        and `grad_norm`, `lr`, equal on all ranks."""
        before = self.module.global_steps
        rate = learning_rate(self.config, self.lr, self.updates_done, self.total_updates)
        for group in self.module.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        norm = None
        for place, batch in enumerate(micro_batches):
            self.module.set_gradient_accumulation_boundary(place == len(micro_batches) - 1)
            loss, batch_sums = run(batch)
            self.module.backward(loss * self.world)  # DeepSpeed averages gradients over ranks; our losses add up
            norm = self._plain_norm() if self.config.zero_stage == 0 else None
            self.module.step()
            merge_sums(sums, batch_sums)
        if self.module.global_steps != before + 1:
            raise RlpipeError(f"an update made {self.module.global_steps - before} optimizer steps instead of one")
        self.updates_done += 1
        norm = self.module.get_global_grad_norm() if norm is None else norm
        return {"sums": sums, "grad_norm": float(norm), "lr": rate}

    def _plain_norm(self) -> torch.Tensor:
        """Norm of the reduced gradients before clipping; without ZeRO DeepSpeed does not keep it."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def export(self, bucket_bytes: int) -> Iterator[tuple[np.ndarray | None, list[Entry]]]:
        """Yield (bucket uint8 [n], entries) of the plain model's weights on rank 0, adapters merged; (None, []) elsewhere.

        At ZeRO 3 each bucket is gathered by itself, so no rank ever holds a second copy of the model; all ranks must iterate.
        """
        pieces = merged_parameters(self.model.lm)
        layout = self.layout(pieces, bucket_bytes)
        entries = layout.buckets()

        def buffer(number: int) -> torch.Tensor | None:
            return torch.empty(layout.sizes[number], dtype=torch.uint8) if self.rank == 0 else None

        for number, bucket in self.packed(pieces, layout, buffer):
            yield (None, []) if bucket is None else (bucket.numpy(), entries[number])

    def layout(self, pieces: Sequence[Merged], bucket_bytes: int) -> Layout:
        """Where the pieces will lie in buckets of at most bucket_bytes; nothing is gathered for it."""
        whole = [(piece.name, piece.parts[0]) for piece in pieces]
        return Layout.plan(((name, p.dtype, getattr(p, "ds_shape", p.shape)) for name, p in whole), bucket_bytes)

    def packed(
        self, pieces: Sequence[Merged], layout: Layout, buffer: Callable[[int], torch.Tensor | None]
    ) -> Iterator[tuple[int, torch.Tensor | None]]:
        """Yield (number, bucket uint8 [n]) bucket after bucket, packed where buffer(number) says, or None where it says None.

        One gather a bucket at ZeRO 3; all ranks must iterate to the end. DeepSpeed's gather holds a bucket twice for a moment,
        so `buffer` is asked after it, and whoever iterates lets go of a bucket before the next: two buckets at a time in all.
        """
        for number, entries in enumerate(layout.buckets()):
            chosen, pieces = pieces[: len(entries)], pieces[len(entries) :]
            with self.gathered([part for piece in chosen for part in piece.parts]):
                into = buffer(number)
                if into is not None:
                    pack((piece.tensor() for piece in chosen), entries, into)
            yield number, into
            del into

    def gathered(self, parameters: list[nn.Parameter]):
        """Context in which the parameters are whole, whatever the ZeRO stage; all ranks must enter."""
        self.gathers += self.config.zero_stage == 3
        return self.deepspeed.zero.GatheredParameters(parameters, enabled=self.config.zero_stage == 3)

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The plain model's weights one by one, on rank 0; nothing elsewhere, but all ranks must iterate."""
        for bucket, entries in self.export(EXPORT_BUCKET_BYTES):
            for entry in entries:
                yield entry.name, tensor_of(entry, bucket)

    def state(self) -> dict[str, torch.Tensor]:
        """The plain model's weights by name, on rank 0."""
        return dict(self.stream())

    def hand_over(self, take: Callable[[Iterator[tuple[str, torch.Tensor]]], None]) -> None:
        """take(stream) on rank 0. All ranks must call, and all gather to the end, also when rank 0 fails on the way."""
        stream = self.stream()
        try:
            if self.rank == 0:
                take(stream)
        finally:
            for _ in stream:
                pass

    def snapshot(self, folder: Path) -> None:
        """All ranks hand their part of a checkpoint to `writer`, whose `finish` says whether it could be written."""
        progress = {"updates_done": self.updates_done}
        self.module.save_checkpoint(str(folder), tag=self.name, client_state=progress, save_latest=False)
        if self.rank == 0:
            self.writer.submit(lambda: write_progress(folder, self.name, progress))

    def snapshot_model(self, folder: Path, write: Callable[[Iterable[tuple[str, torch.Tensor]]], None]) -> None:
        """As `snapshot`, of a folder that write(the plain model's weights, see `stream`) fills on rank 0."""

        def take(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
            held = list(weights) if self.writer.background else weights

            def files() -> list[Path]:
                write(held)
                return sorted(path for path in folder.rglob("*") if path.is_file())

            self.writer.submit(files)

        self.hand_over(take)

    def save(self, folder: Path) -> None:
        """All ranks write their part, now. Raises CheckpointError if the disk refuses."""
        self.snapshot(folder)
        self.writer.finish()

    def convert(self, folder: Path) -> None:
        """Make a checkpoint readable for `load` with "universal"; one rank is enough. Raises CheckpointError."""
        convert(folder, self.name, 0.9 * self.config.timeout_s)  # before whoever waits for this rank takes it for lost

    def load(self, folder: Path, how: str = PLAIN) -> None:
        """how: plain, from as many ranks; or universal, after `convert`. Raises CheckpointError if that is not possible."""
        try:
            if how == UNIVERSAL:
                with universal(self.module):
                    path, state = self.module.load_checkpoint(str(universal_of(folder)), tag=self.name)
            else:
                path, state = self.module.load_checkpoint(str(folder), tag=self.name)
        except Exception as error:
            raise CheckpointError(
                f"{folder} could not be loaded with {self.world} ranks of the {self.name} at ZeRO "
                f"{self.config.zero_stage}: {error}"
            ) from error
        if path is None:
            raise CheckpointError(f"{folder} holds no checkpoint of the {self.name}")
        self.updates_done = state["updates_done"]

    def load_weights(self, folder: Path, read: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Start from a checkpoint's exported weights with a fresh optimizer. read(): on rank 0, all parameters by name; of a
        LoRA run the adapters are taken instead, as they were. Raises CheckpointError if they do not fit."""
        adapters = adapters_of(self.model)
        wanted = adapters or list(self.model.named_parameters())
        weights = None
        if self.rank == 0:
            weights = read_adapters(folder) if adapters else read()
        set_weights(self, wanted, weights)
        self.updates_done = read_progress(folder, self.name)["updates_done"]


def merge_sums(total: dict[str, float], part: dict[str, float]) -> None:
    """Add `part` into `total`; names starting with `max_` keep the largest."""
    for name, value in part.items():
        if name.startswith("max_"):
            total[name] = max(total.get(name, -math.inf), value)
        else:
            total[name] = total.get(name, 0.0) + value


def learning_rate(config: LearnerConfig, lr: float, update: int, total: int) -> float:
    """Rate of the given 0-based optimizer update: linear warm-up to `lr`, then constant, or linear or cosine to `lr_floor` of
    it over `total`."""
    if update < config.lr_warmup:
        return lr * (update + 1) / config.lr_warmup
    done = min(1.0, (update - config.lr_warmup) / max(1, total - config.lr_warmup))
    left = {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}.get(config.lr_schedule, 1.0)
    return lr * (config.lr_floor + (1.0 - config.lr_floor) * left)


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
