"""Weights by broadcast in a process group of its own: the learner's rank 0 and all rollout workers.

NCCL on GPUs, gloo on CPUs. The group is made from a key-value server directly, beside the learner's own, and serves update
after update; whatever goes wrong in it ends it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import ProcessGroupGloo, TCPStore

from rlpipe.models.weights import Layout
from rlpipe.transport.meeting import Meeting, reach, serve
from rlpipe.transport.pages import Pages

BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"


class Group:
    """One member of a group. rank 0 sends. `close` frees its connections; nothing can be sent afterwards."""

    def __init__(self, name: str, server: TCPStore, address: str, device: torch.device, timeout_s: float):
        self.name, self.server, self.address, self.device, self.timeout_s = name, server, address, device, timeout_s
        self.backend = None

    @classmethod
    def host(cls, name: str, host: str, device: torch.device, timeout_s: float) -> Group:
        """The sender's member, which serves the meeting."""
        return cls(name, *serve(host, timeout_s), device, timeout_s)

    def meeting(self, version: int) -> Meeting:
        return Meeting(self.server, f"{self.name}, version {version}", self.timeout_s)

    def connect(self, rank: int, world: int) -> None:
        """Make the process group, unless it is there. All members call it after they met."""
        if self.backend is not None:
            return
        deadline = timedelta(seconds=self.timeout_s)
        if self.device.type == "cpu":
            self.backend = ProcessGroupGloo(_prefixed(self), rank, world, deadline)
            return
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = deadline
        with _blocking_wait():
            self.backend = ProcessGroupNCCL(_prefixed(self), rank, world, options)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """From rank 0 to all; returns when it is done here. Raises RuntimeError when a member died or the deadline passed."""
        self.backend.broadcast(tensor, 0, timedelta(seconds=self.timeout_s)).wait(timedelta(seconds=self.timeout_s))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def close(self) -> None:
        backend, self.backend, self.server = self.backend, None, None
        if backend is not None:
            backend.abort()


@dataclass(frozen=True, slots=True)
class Broadcast:
    """group: its name; address: of its meeting; receivers: all members but the sender."""

    group: str
    address: str
    receivers: int
    device: str  # cpu | cuda, where the bytes are on their way
    timeout_s: float  # of every wait

    def receive(self, layout: Layout, version: int, group: Group) -> Iterator[tuple[int, torch.Tensor]]:
        """(digest, bucket uint8 [n] on the group's device) one by one, all in one buffer."""
        meeting = group.meeting(version)
        try:
            group.connect(meeting.arrive(self.receivers), self.receivers + 1)
            buffer = torch.empty(layout.largest, dtype=torch.uint8, device=group.device)
            for number, size in enumerate(layout.sizes):
                group.broadcast(buffer[:size])
                yield meeting.expect(number)[0], buffer[:size]
        except GeneratorExit:  # whoever takes the buckets found one damaged
            meeting.fail(f"bucket {number} was not taken")
            raise
        except Exception as error:
            meeting.fail(f"{type(error).__name__}: {error}")
            raise

    def join(self) -> Group:
        """A receiver's member, not yet connected. Raises ClusterError if the sender is not there."""
        server, device = reach(self.address, self.timeout_s), torch.device(self.device)
        return Group(self.group, server, self.address, device, self.timeout_s)


class BroadcastSender:
    """Sends the buckets of one update to `receivers` members, one after the other. release: a bucket's memory is given back
    when it is sent."""

    def __init__(self, group: Group, layout: Layout, version: int, receivers: int, release: bool):
        self.group, self.layout, self.receivers, self.release = group, layout, receivers, release
        self.pages: Pages | None = None
        self.meeting = group.meeting(version)
        self.held = layout.largest  # bytes at most

    def buffer(self, number: int) -> torch.Tensor:
        """Where bucket `number` is to be packed, uint8 [n]."""
        if number == 0:
            self.meeting.open(self.receivers)
            self.group.connect(0, self.receivers + 1)
        if self.group.device.type == "cuda":  # torch keeps freed memory there for the next one
            return torch.empty(self.layout.sizes[number], dtype=torch.uint8, device=self.group.device)
        if self.pages is None:
            self.pages = Pages(self.layout.largest)
        return self.pages.tensor[: self.layout.sizes[number]]

    def send(self, number: int, bucket: torch.Tensor, digest: int) -> None:
        self.meeting.check()
        self.meeting.announce(number, digest)
        self.group.broadcast(bucket)
        if self.release and self.pages is not None:
            self.pages.release()

    def finish(self) -> None:
        """Nothing is left to do: a broadcast is over when it is over everywhere."""


def _prefixed(group: Group):
    from torch.distributed import PrefixStore

    return PrefixStore(f"{group.name} members", group.server)


@contextmanager
def _blocking_wait() -> Iterator[None]:
    """NCCL's process group reads it when it is made: a wait past its deadline then raises, instead of ending the process."""
    before = os.environ.get(BLOCKING)
    os.environ[BLOCKING] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[BLOCKING]
        else:
            os.environ[BLOCKING] = before
