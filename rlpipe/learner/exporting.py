"""A policy's weights on their way out: what every rank does for it, and how the driver asks for it.

At ZeRO 3 all ranks gather bucket after bucket, whatever becomes of them on rank 0: a carrier that fails must not leave the
others waiting in a collective. So a failure is noted, and the gathering goes on to its end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlpipe.errors import ClusterError, RlpipeError
from rlpipe.learner.engine import Engine
from rlpipe.models.adapters import Merged, adapter_parameters, base_parameters, has_adapters, merged_parameters, scalings
from rlpipe.models.weights import Layout, digest
from rlpipe.transport.broadcast import Broadcast, BroadcastSender, Group
from rlpipe.transport.meeting import first_line
from rlpipe.transport.pages import Pages
from rlpipe.transport.shared import Shared, SharedSender
from rlpipe.transport.update import Facts, gpu, machine

log = logging.getLogger("rlpipe")

WHOLE, BASE, ADAPTERS = "whole", "base", "adapters"  # what can be sent: all of a model; or both halves of one with adapters
PIECES: dict[str, Callable[[Any], list[Merged]]] = {
    WHOLE: merged_parameters,
    BASE: base_parameters,
    ADAPTERS: adapter_parameters,
}
BROADCAST, SHARED = "broadcast", "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A carrier wanted of rank 0. way: BROADCAST | SHARED; device: cpu | cuda, of the bytes on their way; group: the name of a
    broadcast's process group, a new one if rank 0 does not hold it; timeout_s: of every wait."""

    way: str
    contents: str
    version: int
    receivers: int
    device: str
    group: str = ""
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of an export on rank 0. error: "" if all went well; peak_bytes: of buffers and gathered parameters together;
    gathers: of ZeRO 3, counted."""

    digests: tuple[int, ...]
    error: str
    peak_bytes: int
    gathers: int


class Exporter:
    """One rank's part. Methods that gather are called on all ranks, in the same order."""

    def __init__(self, engine: Engine, bucket_bytes: int):
        self.engine, self.bucket_bytes = engine, bucket_bytes
        self.group: Group | None = None
        self.sender: BroadcastSender | SharedSender | None = None
        self.pages: Pages | None = None
        self._error, self._gathers = "", 0

    def plan(self, contents: str) -> tuple[Layout, dict[str, float]]:
        """(layout, factors of B A by name), without gathering. The layout is the same as long as the model is."""
        lm = self.engine.model.lm
        return self.engine.layout(PIECES[contents](lm), self.bucket_bytes), scalings(lm) if contents == ADAPTERS else {}

    def facts(self) -> tuple[Facts, bool]:
        """(where rank 0 is, whether the model has adapters)."""
        group = self.group.name if self.group else ""
        return Facts(machine(), gpu(), group, -1), has_adapters(self.engine.model.lm)

    def prepare(self, order: Order, host: str) -> Broadcast | Shared:
        """On rank 0, before `send`: where receivers find what will be sent. host: this machine, as others reach it."""
        layout, device = self.plan(order.contents)[0], torch.device(order.device)
        gathers = self.engine.config.zero_stage == 3  # what is gathered counts, too
        if order.way == SHARED:
            settings = (order.version, order.receivers, device, 1 if gathers else 2, order.timeout_s)
            self.sender = SharedSender(host, layout, *settings)
            return self.sender.carrier
        if self.group is None or self.group.name != order.group:
            self.leave()
            self.group = Group.host(order.group, host, device, order.timeout_s)
        self.sender = BroadcastSender(self.group, layout, order.version, order.receivers, release=gathers)
        return Broadcast(order.group, self.group.address, order.receivers, order.device, order.timeout_s)

    def send(self, contents: str) -> Receipt:
        """To the receivers that `prepare` was told of. Never raises for them: the receipt says what went wrong."""
        sender, self.sender, self._error = self.sender, None, ""
        digests: list[int] = []

        def hand_on(number: int, bucket: torch.Tensor) -> None:
            digests.append(digest(bucket))
            sender.send(number, bucket, digests[-1])

        if self.engine.rank == 0 and sender is None:
            self._error = "nothing was prepared to send the weights by"
        buckets = self._packed(contents, lambda number: self._try(lambda: sender.buffer(number)))
        for number, bucket in buckets:
            if bucket is not None:
                self._try(hand_on, number, bucket)
            del bucket
        if self.engine.rank == 0:
            self._try(lambda: sender.finish())
        if self._error:
            self.leave()
        return self._receipt(contents, digests, sender.held if sender else 0)

    def put(self, contents: str) -> Iterator[np.ndarray | Receipt]:
        """The buckets uint8 [n] one by one, then the receipt; only the receipt on other ranks. All lie in the same memory:
        whoever iterates takes a copy."""
        self._error, digests, layout = "", [], self.plan(contents)[0]
        self.pages = Pages(layout.largest if self.engine.rank == 0 else 0)
        buckets = self._packed(contents, lambda number: self.pages.tensor[: layout.sizes[number]])
        try:
            for _, bucket in buckets:
                if bucket is not None:
                    digests.append(digest(bucket))
                    yield bucket.numpy()
                if self.engine.config.zero_stage == 3:
                    self.pages.release()
        finally:  # also when nobody wants the rest
            for _ in buckets:
                pass
            self.pages = None
        yield self._receipt(contents, digests, layout.largest if self.engine.rank == 0 else 0)

    def leave(self) -> None:
        """End the process group of broadcasts, if there is one."""
        group, self.group = self.group, None
        if group is not None:
            self._try(group.close)

    def _packed(self, contents: str, buffer: Callable[[int], torch.Tensor | None]):
        pieces, self._gathers = PIECES[contents](self.engine.model.lm), self.engine.gathers
        wanted = buffer if self.engine.rank == 0 else lambda number: None
        return self.engine.packed(pieces, self.engine.layout(pieces, self.bucket_bytes), wanted)

    def _try(self, work: Callable, *args: Any) -> Any:
        """Its result; None once anything went wrong, of which the first is noted."""
        if self._error:
            return None
        try:
            return work(*args)
        except (RlpipeError, RuntimeError, OSError) as error:
            self._error = first_line(error)
            log.warning("sending weights: %s", self._error)
            return None

    def _receipt(self, contents: str, digests: list[int], held: int) -> Receipt:
        gathered = self.plan(contents)[0].largest if self.engine.config.zero_stage == 3 else 0
        return Receipt(tuple(digests), self._error, held + gathered, self.engine.gathers - self._gathers)


class ExportingRank:
    """For an actor with an `exporter`: its methods as the driver calls them, see `ExportingRanks`."""

    exporter: Exporter

    def weights_facts(self) -> tuple[Facts, bool]:
        return self.exporter.facts()

    def weights_plan(self, contents: str) -> tuple[Layout, dict[str, float]]:
        return self.exporter.plan(contents)

    def weights_prepare(self, order: Order) -> Broadcast | Shared:
        import ray

        return self.exporter.prepare(order, ray.util.get_node_ip_address())

    def weights_send(self, contents: str) -> Receipt:
        return self.exporter.send(contents)

    def weights_put(self, contents: str) -> Iterator[np.ndarray | Receipt]:
        yield from self.exporter.put(contents)

    def weights_follow(self, contents: str) -> Receipt:
        """The part of the other ranks in `weights_put`."""
        (receipt,) = self.exporter.put(contents)
        return receipt


class ExportingRanks:
    """The driver's side, for a group of ranks (`workers`, `_wait`) whose actors are `ExportingRank`s."""

    def weights_facts(self) -> tuple[Facts, bool]:
        return self._wait([self.workers[0].weights_facts.remote()], "where the learner is")[0]

    def weights_plan(self, contents: str) -> tuple[Layout, dict[str, float]]:
        return self._wait([self.workers[0].weights_plan.remote(contents)], "the layout of the weights")[0]

    def put_weights(self, contents: str, buckets: int) -> tuple[tuple, Receipt]:
        """(references to the buckets, receipt). The driver owns them: they outlive the rank that made them."""
        first = self.workers[0].weights_put.options(num_returns=buckets + 1).remote(contents)
        others = [worker.weights_follow.remote(contents) for worker in self.workers[1:]]
        receipt = self._wait([first[-1], *others], "weights into the object store")[0]
        return tuple(first[:-1]), _checked(receipt)

    def prepare_weights(self, order: Order) -> Broadcast | Shared:
        return self._wait([self.workers[0].weights_prepare.remote(order)], f"preparing a {order.way} of weights")[0]

    def send_weights(self, contents: str) -> list:
        """Set off what was prepared; hand the result to `sent_weights`."""
        return [worker.weights_send.remote(contents) for worker in self.workers]

    def sent_weights(self, pending: list) -> Receipt:
        return self._wait(pending, "sending weights")[0]


def _checked(receipt: Receipt) -> Receipt:
    if receipt.error:
        raise ClusterError(f"weights did not get into the object store: {receipt.error}")
    return receipt
