"""One update of a model's weights, and the worker's side of it: check, verify bucket by bucket, copy in place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlpipe.errors import ClusterError, WeightMismatch
from rlpipe.models.adapters import merge
from rlpipe.models.weights import Entry, Layout, check_names, combined, digest, pack, view
from rlpipe.transport.broadcast import Broadcast, Group
from rlpipe.transport.meeting import first_line
from rlpipe.transport.shared import Shared
from rlpipe.transport.store import Stored

Carrier = Stored | Broadcast | Shared


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """A version of the policy on its way. layout: of what `carrier` brings. checksum: of the whole, "" where it is not known
    before the bytes.

    Of a run with adapters the layout holds A and B alone (NAME:A, NAME:B); scalings: NAME → factor of B A; base: the plain
    model's weights without them, for workers that do not have those yet.
    """

    version: int
    layout: Layout = Layout()
    carrier: Carrier = Stored()
    checksum: str = ""
    scalings: Mapping[str, float] = field(default_factory=dict)
    base: WeightUpdate | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """Where a process is. machine: the same for processes that can open each other's memory; device: its GPU, "" on a CPU;
    group: the process group it holds, "" for none."""

    machine: str
    device: str
    group: str
    version: int


class Receiver:
    """What a worker keeps between updates. version -1: the model's weights are not those of any version, and must not be used.

    One update at a time; `put` may run beside the model's use.
    """

    def __init__(self):
        self.version, self.checksum = -1, ""
        self.base = ""  # checksum of the base that `matrices` are of
        self.matrices: dict[str, torch.Tensor] = {}  # of adapted layers without their adapters, on the host
        self.adapters: dict[str, torch.Tensor] = {}
        self.digests: tuple[int, ...] = ()
        self.group: Group | None = None

    def facts(self) -> Facts:
        return Facts(machine(), gpu(), self.group.name if self.group else "", self.version)

    def forget(self) -> None:
        """The model's weights are gone (released, overwritten): the next update brings all of them, the base included."""
        self.version, self.checksum, self.base = -1, "", ""

    def receive(self, update: WeightUpdate, module: torch.nn.Module) -> tuple[int, str]:
        """Take an update into `module`, in place, so that whatever captured its storage stays valid; (version, checksum).

        Names, shapes and dtypes are checked before anything is changed, every bucket before its bytes are. Raises
        WeightMismatch for weights that are damaged or of another model, ClusterError when they do not come. From then on the
        version is -1, until an update succeeds.
        """
        if update.checksum and (self.version, self.checksum) == (update.version, update.checksum):
            return self.version, self.checksum
        parameters = dict(module.named_parameters())
        if update.scalings:
            check_adapters(update, parameters)
        else:
            check_names(update.layout, parameters, update.version)
        if update.base is not None and self.base != update.base.checksum:
            check_names(update.base.layout, parameters, update.version)
            self._take_base(update.base, parameters, update.scalings)
        self.version, self.checksum = -1, ""
        if not update.scalings:
            self.base = ""  # what is not adapted is about to be overwritten as well
        found = self._take(update, self._keep if update.scalings else lambda entry, data: parameters[entry.name].copy_(data))
        for name, scaling in update.scalings.items():
            self._merge(name, scaling, parameters[name])
        self.version, self.checksum = update.version, found
        return self.version, self.checksum

    @torch.no_grad()
    def _take(self, update: WeightUpdate, place) -> str:
        """place(entry, tensor in its bucket) for everything that the update brings; its checksum."""
        what = f"weights of version {update.version}"
        digests = []
        buckets = self._buckets(update, what)
        try:
            for (expected, bucket), entries in zip(buckets, update.layout.buckets(), strict=True):
                digests.append(digest(bucket))
                if digests[-1] != expected:
                    raise WeightMismatch(f"{what} arrived damaged: bucket {len(digests)} of {len(update.layout.sizes)}")
                for entry in entries:
                    place(entry, view(entry, bucket))
        except RuntimeError as error:  # what torch's process groups and stores raise
            way = type(update.carrier).__name__.lower()
            raise ClusterError(f"{what} did not arrive, way: {way}: {first_line(error)}") from error
        finally:
            buckets.close()
        found = combined(digests, update.base.checksum if update.base else "")
        if update.checksum and found != update.checksum:
            raise WeightMismatch(f"{what} arrived damaged: checksum {found}, expected {update.checksum}")
        self.digests = tuple(digests)
        return found

    def _buckets(self, update: WeightUpdate, what: str) -> Iterator[tuple[int, torch.Tensor]]:
        carrier = update.carrier
        if isinstance(carrier, Stored):
            yield from carrier.receive(update.layout, what)
        elif isinstance(carrier, Shared):
            yield from carrier.receive(update.layout, update.version)
        else:
            try:
                if self.group is None or self.group.name != carrier.group:
                    self._leave()
                    self.group = carrier.join()
                yield from carrier.receive(update.layout, update.version, self.group)
            except BaseException:  # also when a bucket was refused: the others must not wait for a member that left off
                self._leave()
                raise

    def _leave(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.close()

    def _take_base(self, base: WeightUpdate, parameters: dict[str, torch.Tensor], adapted: Mapping[str, float]) -> None:
        self.forget()

        def place(entry: Entry, data: torch.Tensor) -> None:
            parameters[entry.name].copy_(data)
            if entry.name in adapted:
                self.matrices[entry.name] = data.to("cpu", copy=True)

        self.base = self._take(base, place)

    def _keep(self, entry: Entry, data: torch.Tensor) -> None:
        self.adapters[entry.name] = data.to("cpu", copy=True)

    @torch.no_grad()
    def _merge(self, name: str, scaling: float, parameter: torch.Tensor) -> None:
        """On the parameter's device, as the learner's export does."""
        parts = (self.matrices[name], self.adapters[f"{name}:A"], self.adapters[f"{name}:B"])
        parameter.copy_(merge(*(part.to(parameter.device) for part in parts), scaling))

    def put(self, version: int, layout: Layout, module: torch.nn.Module) -> Iterator[np.ndarray | int]:
        """The buckets uint8 [n] of the version that was received last, from what is held here, and then how many are good: for
        workers that start later. Once a newer version comes the rest are empty."""
        sources = dict(module.named_parameters()) | self.adapters
        expected, good = self.digests, 0
        for number, (entries, size) in enumerate(zip(layout.buckets(), layout.sizes, strict=True)):
            bucket = torch.empty(size if good == number else 0, dtype=torch.uint8)
            if good == number and self.version == version:
                pack([sources[entry.name] for entry in entries], entries, bucket)
                good += self.version == version and digest(bucket) == expected[number]
            yield bucket.numpy() if good > number else np.zeros(0, np.uint8)
        yield good


def check_adapters(update: WeightUpdate, parameters: Mapping[str, Any]) -> None:
    """Raises WeightMismatch unless the update has A [r, i] and B [o, r] of matrices [o, i] of the model, and nothing else."""
    entries = {entry.name: entry.shape for entry in update.layout.entries}
    wanted = {f"{name}:{side}" for name in update.scalings for side in "AB"}
    odd = sorted(entries.keys() ^ wanted) or sorted(update.scalings.keys() - parameters.keys())
    if odd:
        raise WeightMismatch(f"adapters of version {update.version} and this model differ in {len(odd)} names, first {odd[0]}")
    for name in update.scalings:
        (rank, inputs), (outputs, other) = entries[f"{name}:A"], entries[f"{name}:B"]
        shape = tuple(parameters[name].shape)
        if rank != other or (outputs, inputs) != shape:
            sent = (outputs, inputs)
            raise WeightMismatch(f"{name}: adapters of version {update.version} are for {sent}, the model has {shape}")


@cache
def machine() -> str:
    """The kernel and the process namespace: processes that share both can open each other's files in memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{os.uname().nodename} {os.getpid()}"


@cache
def gpu() -> str:
    """The identity of this process's GPU, "" without one."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if torch.cuda.is_available() else ""
