"""Weights by shared memory, for workers on the learner's machine: slots that rank 0 fills and the workers copy from.

On CPUs a slot is an anonymous file in memory (memfd_create) that others open through its owner's /proc folder: it has no name,
so the kernel frees it with its last user, whoever dies. On a GPU it is device memory that a worker there maps (CUDA IPC).
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlpipe.errors import ClusterError
from rlpipe.models.weights import Layout
from rlpipe.transport.meeting import Meeting, reach, serve


@dataclass(frozen=True, slots=True)
class Shared:
    """slots: how many buckets lie in shared memory at a time; address: of the meeting, which says where they lie."""

    slots: int
    address: str
    receivers: int
    timeout_s: float  # of every wait

    def receive(self, layout: Layout, version: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(digest, bucket uint8 [n] where it lies) one by one; a bucket is the sender's again when the next is asked for."""
        meeting = Meeting(reach(self.address, self.timeout_s), _what(version), self.timeout_s)
        known: dict[str, torch.Tensor] = {}
        try:
            meeting.arrive(self.receivers)
            for number, size in enumerate(layout.sizes):
                expected, handle = meeting.expect(number)
                if handle not in known:
                    known[handle] = open_slot(pickle.loads(bytes.fromhex(handle)))
                yield expected, known[handle][:size]
                if self.slots == 1:  # the sender makes a new one for the next bucket
                    known.clear()
                meeting.taken(number)
        except GeneratorExit:  # whoever takes the buckets found one damaged
            meeting.fail(f"bucket {number} was not taken")
            raise
        except Exception as error:
            meeting.fail(f"{type(error).__name__}: {error}")
            raise


class SharedSender:
    """Sends the buckets of one update to `receivers` workers, through slots that are freed when it is. With one slot a bucket
    is gone when `send` returns; with two, one is packed while the other is read."""

    def __init__(
        self, host: str, layout: Layout, version: int, receivers: int, device: torch.device, slots: int, timeout_s: float
    ):
        self.layout, self.receivers, self.device, self.slots = layout, receivers, device, slots
        server, address = serve(host, timeout_s)
        self.meeting = Meeting(server, _what(version), timeout_s)
        self.carrier = Shared(slots, address, receivers, timeout_s)
        self.held = min(slots, len(layout.sizes)) * layout.largest  # bytes at most
        self._made: dict[int, tuple[Any, torch.Tensor, Any]] = {}

    def buffer(self, number: int) -> torch.Tensor:
        """Where bucket `number` is to be packed, uint8 [n]: a slot that nobody reads any more."""
        if number == 0:
            self.meeting.open(self.receivers, here=True)
        place, size = number % self.slots, self.layout.sizes[number]
        if place in self._made:
            self.meeting.until_taken(number - self.slots, self.receivers)
        else:
            self._made[place] = _make_slot(self.layout.largest if self.slots > 1 else size, self.device)
        return self._made[place][1][:size]

    def send(self, number: int, bucket: torch.Tensor, digest: int) -> None:
        if bucket.is_cuda:
            torch.cuda.current_stream(bucket.device).synchronize()
        self.meeting.announce(number, digest, pickle.dumps(self._made[number % self.slots][0]).hex())
        if self.slots == 1:
            self.meeting.until_taken(number, self.receivers)
            self._made.clear()

    def finish(self) -> None:
        """Wait until the last buckets are taken: the slots go with this object."""
        for number in range(max(0, len(self.layout.sizes) - self.slots), len(self.layout.sizes)):
            self.meeting.until_taken(number, self.receivers)


class _File:
    """An open file that is closed with this object."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.close(self.number)


def _make_slot(nbytes: int, device: torch.device) -> tuple[Any, torch.Tensor, Any]:
    """(what another process opens it by, uint8 [nbytes], what must live as long)."""
    if device.type == "cuda":
        from torch.multiprocessing.reductions import reduce_tensor

        tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return reduce_tensor(tensor)[1], tensor, None
    if not hasattr(os, "memfd_create"):
        raise ClusterError("rollout.transport=shared needs Linux on CPUs; take rollout.transport=store")
    owner = _File(os.memfd_create("rlpipe weights"))
    os.ftruncate(owner.number, nbytes)
    tensor = torch.frombuffer(mmap.mmap(owner.number, nbytes), dtype=torch.uint8)
    return (os.getpid(), owner.number, nbytes), tensor, owner


def open_slot(handle: Any) -> torch.Tensor:
    """Another process's slot, uint8 [n], in this one. Raises ClusterError if it cannot be reached."""
    if len(handle) > 3:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        arguments = list(handle)
        arguments[DEVICE] = torch.cuda.current_device()  # the same GPU may have another number here
        return rebuild_cuda_tensor(*arguments)
    pid, number, nbytes = handle
    try:
        with Path(f"/proc/{pid}/fd/{number}").open("r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
    except OSError as error:
        raise ClusterError(f"the memory of process {pid} cannot be reached from here: {error}") from error


DEVICE = 6  # place of the device in the arguments of rebuild_cuda_tensor


def _what(version: int) -> str:
    return f"shared weights, version {version}"
