"""A checkpoint for another number of ranks: DeepSpeed's universal checkpoint, or only the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlpipe.checkpoint.manifest import CACHES
from rlpipe.errors import CheckpointError

ADAPTERS = "adapters.safetensors"  # beside a model's folder, which has them merged


def universal_of(folder: Path) -> Path:
    return folder / CACHES[0]


def convert(folder: Path, tag: str, timeout_s: float) -> None:
    """Make `folder/universal/tag` from `folder/tag`, unless it is there: each parameter's weights and moments in files of their
    own, by name. In a process of its own, since it reads all ranks' parts. Raises CheckpointError."""
    done = universal_of(folder) / tag
    if done.is_dir():
        return
    partial = done.with_name(f"{tag}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    workers = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder / tag)]
    command += ["--output_folder", str(partial), "--num_extract_workers", workers, "--num_merge_workers", workers]
    if not list((folder / tag).glob("zero_pp_rank_*_model_states.pt")):  # of ZeRO 1 and 2, which lack what pipelines add
        command.append("--inject_missing_state")
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    try:
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
        if found.returncode:
            raise OSError((found.stderr.strip() or found.stdout.strip() or "it said nothing").splitlines()[-1])
        partial.rename(done)
    except (OSError, subprocess.TimeoutExpired) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder / tag} could not be converted to a universal checkpoint: {error}") from error


@contextmanager
def universal(module: Any) -> Iterator[None]:
    """Context in which a DeepSpeed engine reads universal checkpoints; otherwise it would only if its configuration said so
    from the start, and then no others."""
    from deepspeed.utils import logger

    config, level = module._config, logger.level
    before, config.load_universal_checkpoint = config.load_universal_checkpoint, True
    logger.setLevel("ERROR")  # it warns of model parallelism that is not there
    try:
        yield
    finally:
        config.load_universal_checkpoint = before
        logger.setLevel(level)


@torch.no_grad()
def set_weights(engine: Any, wanted: Sequence[tuple[str, nn.Parameter]], weights: Mapping[str, torch.Tensor] | None) -> None:
    """Set parameters of an engine that has not trained yet, and the optimizer's own copies of them. All ranks must call.

    engine: `rlpipe.learner.engine.Engine` · wanted: the parameters, by name, equal on all ranks · weights: by the same names,
    on rank 0; None on the others. Raises CheckpointError on all ranks if they do not fit.
    """
    wrong = [""]
    if weights is not None:
        wrong[0] = _misfit(wanted, weights)
    torch.distributed.broadcast_object_list(wrong, src=0)
    if wrong[0]:
        raise CheckpointError(wrong[0])
    for name, parameter in wanted:
        with engine.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=engine.config.zero_stage == 3):
            if weights is not None:
                parameter.copy_(weights[name])
            if engine.config.zero_stage < 3:
                torch.distributed.broadcast(parameter.data, src=0)
    if hasattr(engine.module.optimizer, "refresh_fp32_params"):
        engine.module.optimizer.refresh_fp32_params()


def _misfit(wanted: Sequence[tuple[str, nn.Parameter]], weights: Mapping[str, torch.Tensor]) -> str:
    for name, parameter in wanted:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if name not in weights:
            return f"the checkpoint's exported weights do not fit this model: they have no {name}"
        if weights[name].shape != shape:
            return f"the checkpoint's {name} is {tuple(weights[name].shape)} and this model's {tuple(shape)}"
    return ""


def adapters_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a LoRA run trains, by name; empty for other runs."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name]


def write_adapters(folder: Path, adapters: Mapping[str, torch.Tensor]) -> list[Path]:
    """All of a LoRA run's trained parameters, by name, whole; returns the file. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(adapters), folder / ADAPTERS)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return [folder / ADAPTERS]


def read_adapters(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / ADAPTERS) if (folder / ADAPTERS).is_file() else {}


def write_progress(folder: Path, tag: str, progress: Mapping[str, int]) -> list[Path]:
    """What an engine counts, where it can be read without DeepSpeed; returns the file. Raises OSError."""
    path = folder / f"{tag}.json"
    path.write_text(json.dumps(dict(progress)), encoding="utf8")
    return [path]


def read_progress(folder: Path, tag: str) -> dict[str, int]:
    """Raises CheckpointError for a checkpoint that does not say."""
    path = folder / f"{tag}.json"
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}), so the number of updates is not known") from error
