"""A rank's part of a checkpoint: copied to host memory while training stands still, written while it goes on.

What is saved is DeepSpeed's business; how it is written is ours. Its own checkpoint engine writes at once, and a rank whose
disk is full leaves `save_checkpoint` while the others wait for it in a collective. Here no write raises where it is asked for:
all ranks go through the same collectives, and the failure comes up in `Writer.finish`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from rlpipe.checkpoint import manifest
from rlpipe.errors import CheckpointError

log = logging.getLogger("rlpipe")


class Writer:
    """Writes files one after the other: at once, or with `background` in a thread of its own. rank: for messages.

    Two threads may use it in turns: one submits a checkpoint's files, then another may `finish`, then the first goes on.
    """

    def __init__(self, rank: int):
        self.rank, self.background = rank, False
        self.jobs: list[Future] = []
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, write: Callable[[], Iterable[Path]]) -> None:
        """write() makes files and returns them; it may run later, so it must own what it writes. Never raises."""
        if self.background:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self.jobs.append(self._pool.submit(self._recorded, write))
            return
        job: Future = Future()
        try:
            job.set_result(self._recorded(write))
        except Exception as error:
            job.set_exception(error)
        self.jobs.append(job)

    def finish(self) -> dict[Path, manifest.Record]:
        """Wait until all is on the disk; records of the files. Raises CheckpointError for the first that could not be
        written."""
        jobs, self.jobs = self.jobs, []
        files: dict[Path, manifest.Record] = {}
        failure: BaseException | None = None
        for job in jobs:  # all of them, also after a failure: nothing may be written once this returns
            failure = failure or job.exception()
            files |= job.result() if job.exception() is None else {}
        if isinstance(failure, CheckpointError):
            raise failure
        if failure is not None:
            raise CheckpointError(
                f"rank {self.rank}'s part of the checkpoint could not be written: {type(failure).__name__}: {failure}. Free "
                "some space; the last complete checkpoint is untouched, and resume=auto continues from it"
            ) from failure
        return files

    def forget(self) -> None:
        """Wait for what nobody will ask about any more: the checkpoint it belongs to has been given up."""
        try:
            self.finish()
        except CheckpointError as error:
            log.info("given up with its checkpoint: %s", error)

    def _recorded(self, write: Callable[[], Iterable[Path]]) -> dict[Path, manifest.Record]:
        files = {}
        for path in write():
            manifest.sync(path)
            files[path] = manifest.record(path)
        return files

    def submit_tensors(self, state: Any, path: Path) -> None:
        """Save a tree of tensors, as it is now, with `torch.save`."""
        held = host_copy(state) if self.background else state
        self.submit(lambda: _save(held, path))


def _save(state: Any, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # through Python's file, whose writes let other threads run
        torch.save(state, file)
    return [path]


def host_copy(state: Any, seen: dict[tuple, torch.Tensor] | None = None) -> Any:
    """The same tree (dicts, lists, tuples, named tuples) with tensors copied to host memory and the rest copied deeply.

    Tensors that are one and the same stay so. A view becomes a tensor of its own: what is saved are its elements, not the
    buffer behind it.
    """
    seen = {} if seen is None else seen
    if isinstance(state, torch.Tensor):
        if state.device.type == "meta":
            return state
        key = (state.data_ptr(), state.shape, state.stride(), state.dtype, state.device)
        if key not in seen or not state.numel():
            held = state.detach().to("cpu", copy=True)
            seen[key] = torch.nn.Parameter(held, state.requires_grad) if isinstance(state, torch.nn.Parameter) else held
        return seen[key]
    if isinstance(state, dict):
        copied = copy.copy(state)  # keeps the kind, and what hangs on it (a state dict's metadata)
        for name, value in state.items():
            copied[name] = host_copy(value, seen)
        return copied
    if isinstance(state, torch.Size):
        return state
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(host_copy(value, seen) for value in state))
    if isinstance(state, list | tuple):
        return type(state)(host_copy(value, seen) for value in state)
    return copy.deepcopy(state)


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its buffers by name, copied: where roles take turns on a GPU, they have left it before all is written."""
    return host_copy(dict(module.named_buffers()))


def checkpoint_engine(writer: Writer) -> Any:
    """DeepSpeed's checkpoint engine with its writes handed to `writer`."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Handed(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            writer.submit_tensors(state_dict, Path(path))

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """Left to the writes: one rank's disk must not part it from the others."""

    return Handed()
