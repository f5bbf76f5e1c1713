"""The policy's updates: old and reference log-probabilities, the loss, the parity gauge's raw material."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlpipe.checkpoint.fitting import EXPORT, PLAIN
from rlpipe.config import LearnerConfig
from rlpipe.errors import CheckpointError
from rlpipe.learner.batches import Batches, is_filler
from rlpipe.learner.engine import Engine
from rlpipe.learner.micro_batches import Shard
from rlpipe.learner.reshaping import adapters_of, write_adapters
from rlpipe.learner.sharding import frozen_copy
from rlpipe.learner.snapshot import buffers_of
from rlpipe.models.adapters import has_adapters, without_adapters
from rlpipe.models.loading import load_model, save_model
from rlpipe.models.policy import DiffusionLM
from rlpipe.objectives.objective import Objective

TAG = "learner"


class PolicyLearner:
    """model: on its device already. objective: the loss. temperature: of the sampler, so that ratios compare like with like."""

    def __init__(self, model: DiffusionLM, objective: Objective, config: LearnerConfig, temperature: float, total_updates: int):
        self.objective, self.temperature, self.spec = objective, temperature, model.spec
        self.reference = _reference(model, objective, config)
        self.engine = Engine(model, config, config.lr, total_updates, TAG)
        self.steps_done = 0

    def train(self, shard: Shard, epochs: int) -> dict[str, Any]:
        """All optimizer updates of a step. Returns `updates`, one dict each (additive `sums` of this rank, see
        `Objective.loss`; `grad_norm`, `lr`, equal on all ranks), and the parity gauge's raw material, flat over the scored
        tokens whose state the rollout shared: `learner` and `rollout` log-probabilities (float32), whether they should agree,
        `exact` (bool), and by how many weight versions the rollout was behind, `lag` (int32); see `parity.measure`.

        The first update opens the step, so its own forward pass gives its old log-probabilities; only what later updates train
        on is scored beforehand (all of it where adapters have dropout, which is off in scoring).
        """
        self.batches = Batches(shard.samples, self.spec, self.engine.device)
        count = len(self.batches.samples)
        self.old: list[torch.Tensor | None] = [None] * count
        self.referred: list[torch.Tensor | None] = [None] * count
        later = shard.updates if self.engine.config.lora_dropout else shard.updates[1:]
        self._score([batch for update in later for batch in update] + shard.gauge, self.old, self.engine.module)
        if self.objective.needs_reference:
            with self._reference_policy() as model:
                self._score([batch for update in shard.updates for batch in update], self.referred, model)
        self.engine.module.train()
        updates = [self.engine.update(batches, self._loss) for _ in range(epochs) for batches in shard.updates]
        self.steps_done += 1
        self._move_reference()
        return {"updates": updates} | self._parity()

    def score(self, shard: Shard) -> list[np.ndarray]:
        """Log-probabilities float32[M] of every sample of the shard's updates, as the weights are now; empty for the others."""
        self.batches = Batches(shard.samples, self.spec, self.engine.device)
        found: list[torch.Tensor | None] = [None] * len(self.batches.samples)
        self._score([batch for update in shard.updates for batch in update], found, self.engine.module)
        return [np.zeros(0, np.float32) if logp is None else logp.cpu().numpy() for logp in found]

    def _loss(self, batch: list[int]) -> tuple[torch.Tensor, dict[str, float]]:
        certainty = self.objective.certainty
        wanted = ("value",) if certainty is None else ("right", certainty.entropy_temperature)
        logp, entropy = self._forward(batch, self.engine.module, *wanted)
        if is_filler(batch):  # the pass happens, so that collectives match on all ranks, and adds exactly nothing
            return (logp * 0.0).sum(), {}
        if self.old[batch[0]] is None:
            self._keep(self.old, batch, logp)
        terms = self.objective.loss(
            logp,
            torch.cat([self.old[i] for i in batch]),
            self.batches.entries(batch, positions=self.objective.bound is not None),
            ref_logp=torch.cat([self.referred[i] for i in batch]) if self.objective.needs_reference else None,
            behaviour_logp=self.batches.behaviour(batch),
            entropy=entropy,
        )
        values = torch.stack([value.double() for value in terms.sums.values()]).tolist()  # one wait for the device, not ten
        return terms.loss, dict(zip(terms.sums, values, strict=True)) | self.batches.off_policy(batch)

    @torch.no_grad()
    def _score(self, batches: Sequence[list[int]], into: list, model: Callable) -> None:
        """Log-probabilities of every sample of the batches."""
        self.engine.module.eval()
        for batch in batches:
            logp, _ = self._forward(batch, model)
            if not is_filler(batch):
                self._keep(into, batch, logp)

    def _forward(
        self, batch: list[int], model: Callable, entropy: str = "none", *temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and, if asked for, entropies [M] of the batch's scored tokens, sample after sample; see
        `DiffusionLM.forward`."""
        packed = self.batches.packed(batch)
        inputs = (packed.input_ids, packed.position_ids, packed.plan(), packed.index, packed.targets)
        logp, spread = model(*inputs, self.temperature, entropy, *temperature)
        order = packed.slot.argsort()
        return logp[order], None if spread is None else spread[order]

    def _keep(self, into: list, batch: list[int], logp: torch.Tensor) -> None:
        sizes = [self.batches.samples[i].num_scored for i in batch]
        for index, values in zip(batch, logp.detach().float().split(sizes), strict=True):
            into[index] = values.clone()

    def _parity(self) -> dict[str, np.ndarray]:
        known = [
            (~np.isnan(s.rollout_logp), old.cpu().numpy(), s)
            for s, old in zip(self.batches.samples, self.old, strict=True)
            if old is not None
        ]
        none = [np.zeros(0, np.float32)]
        return {
            "learner": np.concatenate([old[mask] for mask, old, _ in known] or none),
            "rollout": np.concatenate([s.rollout_logp[mask] for mask, _, s in known] or none),
            "exact": np.concatenate([s.on_policy[mask] for mask, _, s in known] or [np.zeros(0, bool)]),
            "lag": np.concatenate([s.lag[mask] for mask, _, s in known] or [np.zeros(0, np.int32)]),
        }

    def _reference_policy(self):
        """Context that gives the reference policy as a callable like the engine's module."""
        if self.reference is None:
            return _Adapterless(self.engine)
        return nullcontext(self.reference)

    @torch.no_grad()
    def _move_reference(self) -> None:
        """The lagged copy takes up a share of the policy every `kl_lag` steps (TR-DPO, arXiv 2404.09656). Of a LoRA run A and B
        move each for itself, so that their product is not the mean of the two products."""
        algo = self.objective.algo
        if self.reference is None or algo.kl_reference != "lagged" or self.steps_done % algo.kl_lag:
            return
        pairs = zip(_plain(self.reference).parameters(), self.engine.model.parameters(), strict=True)
        for held, current in pairs:
            with self.engine.gathered([current]), self.engine.gathered([held]):
                mixed = torch.lerp(held.detach(), current.detach().to(held.dtype), algo.kl_mix)
            _write(held, mixed, self.engine)

    def snapshot(self, folder: Path, tokenizer) -> None:
        """All ranks hand their part of a checkpoint to the engine's writer: DeepSpeed's state, the lagged reference, a Hugging
        Face folder `model` with adapters merged, and the adapters."""
        self._snapshot(folder)
        self.snapshot_model(folder / "model", tokenizer)

    def _snapshot(self, folder: Path) -> None:
        self.engine.snapshot(folder)
        writer, model = self.engine.writer, self.engine.model
        adapters = {name: self._whole(parameter) for name, parameter in adapters_of(model)}
        if adapters and self.engine.rank == 0:
            writer.submit(lambda: write_adapters(folder, adapters))
        if self.reference is not None and self.objective.algo.kl_reference == "lagged":
            state = {"steps_done": self.steps_done}
            state["weights"] = [self._whole(p) for p in _plain(self.reference).parameters()]
            if self.engine.rank == 0:
                writer.submit_tensors(state, folder / "reference.pt")

    def snapshot_model(self, folder: Path, tokenizer) -> None:
        buffers = buffers_of(self.engine.model.lm)
        write = lambda weights: save_model(self.engine.model, tokenizer, folder, weights, buffers=buffers)  # noqa: E731
        self.engine.snapshot_model(folder, write)

    def save(self, folder: Path) -> None:
        """All ranks write their part, now. Raises CheckpointError if the disk refuses."""
        self._snapshot(folder)
        self.engine.writer.finish()

    def save_model(self, folder: Path, tokenizer) -> None:
        """A Hugging Face folder with the current weights, adapters merged, written by rank 0, now; all ranks must call it."""
        self.snapshot_model(folder, tokenizer)
        self.engine.writer.finish()

    def load(self, folder: Path, how: str = PLAIN) -> None:
        """how: see `rlpipe.checkpoint.fitting.way_to_load`. Raises CheckpointError."""
        if how == EXPORT:
            self.engine.load_weights(folder, lambda: self._exported(folder / "model"))
        else:
            self.engine.load(folder, how)
        if self.reference is not None and self.objective.algo.kl_reference == "lagged":
            path = folder / "reference.pt"
            if not path.is_file():
                raise CheckpointError(f"{folder} holds no lagged reference; it was written with another algo.kl_reference")
            state = torch.load(path, weights_only=True)
            self.steps_done = state["steps_done"]
            for held, saved in zip(_plain(self.reference).parameters(), state["weights"], strict=True):
                _write(held, saved.to(held.device), self.engine)

    def _exported(self, folder: Path) -> dict[str, torch.Tensor]:
        return dict(load_model(folder, str(self.engine.model.lm.dtype).removeprefix("torch.")).named_parameters())

    def _whole(self, parameter: torch.Tensor) -> torch.Tensor:
        with self.engine.gathered([parameter]):
            return parameter.detach().cpu().clone()


class _Adapterless:
    def __init__(self, engine: Engine):
        self.engine, self.context = engine, without_adapters(engine.model.lm)

    def __enter__(self):
        self.context.__enter__()
        return self.engine.module

    def __exit__(self, *error):
        return self.context.__exit__(*error)


def _reference(model: DiffusionLM, objective: Objective, config: LearnerConfig):
    """A frozen copy of the policy as it is now, sharded like it at ZeRO 3; None where none is needed, or where adapters can be
    switched off instead."""
    if not objective.needs_reference or (has_adapters(model.lm) and objective.algo.kl_reference == "initial"):
        return None
    held = frozen_copy(model)
    if config.zero_stage < 3:
        return held
    from rlpipe.learner.engine import deepspeed_config, import_deepspeed

    settings = deepspeed_config(config, model.lm.dtype)
    return import_deepspeed().initialize(model=held, config=settings, dist_init_required=False)[0]


def _plain(reference) -> torch.nn.Module:
    return reference if isinstance(reference, DiffusionLM) else reference.module


@torch.no_grad()
def _write(held: torch.Tensor, value: torch.Tensor, engine: Engine) -> None:
    """Set a parameter of the reference, in its own shard at ZeRO 3."""
    if engine.config.zero_stage < 3:
        held.copy_(value)
        return
    with engine.deepspeed.zero.GatheredParameters([held], modifier_rank=0):
        if engine.rank == 0:
            held.copy_(value)
