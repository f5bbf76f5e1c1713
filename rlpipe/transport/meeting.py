"""Where a sender and its receivers meet: a small key-value server on the sender's side, with deadlines.

Torch's TCPStore carries a few bytes for each bucket: who is there, its digest, who is done. A sender that dies takes the server
with it, so that receivers fail at once instead of waiting; a receiver that fails says so here.
"""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, DistNetworkError, PrefixStore, TCPStore

from rlpipe.errors import ClusterError

log = logging.getLogger("rlpipe")

EVERY_S = 10.0  # a line in the log of a wait
GO, FAILED = "go", "failed"


class Meeting:
    """One update's part of the server. what: names it in the log and in errors; timeout_s: of every wait here.

    A wait that passes its deadline, a sender that is gone and a receiver that failed raise ClusterError.
    """

    def __init__(self, server: TCPStore, what: str, timeout_s: float):
        self.server, self.what, self.timeout_s = server, what, timeout_s
        self.keys = PrefixStore(what, server)
        self.alone = False  # the connection broke
        self.processes: list[int] = []  # receivers on this machine

    # --- the sender -----------------------------------------------------------------------------------------------------

    def open(self, receivers: int, here: bool = False) -> None:
        """Wait until all receivers are there, then let them begin. here: they are processes of this machine, so that one that
        dies is missed at once."""
        self._until("arrived", receivers, f"{receivers} receivers")
        if here:
            self.processes = [int(self.keys.get(f"process {number}")) for number in range(1, receivers + 1)]
        self.keys.set(GO, "1")

    def announce(self, bucket: int, digest: int, where: str = "") -> None:
        """The bucket is on its way, or where receivers find it."""
        self.keys.set(f"bucket {bucket}", f"{digest} {where}")

    def until_taken(self, bucket: int, receivers: int) -> None:
        """Wait until every receiver is done with the bucket."""
        self._until(f"taken {bucket}", receivers, f"{receivers} receivers to take bucket {bucket}")

    def check(self) -> None:
        """Raises ClusterError if a receiver said that it failed, or is known to be dead."""
        if self.keys.check([FAILED]):
            raise ClusterError(f"{self.what}: a receiver failed: {self.keys.get(FAILED).decode()}")
        gone = [process for process in self.processes if not runs(process)]
        if gone:
            raise ClusterError(f"{self.what}: process {gone[0]}, which was to receive it, is gone")

    def _until(self, key: str, count: int, whom: str) -> None:
        started, said, pause = time.monotonic(), EVERY_S, 0.0005
        while (found := self.keys.add(key, 0)) < count:
            self.check()
            waited = time.monotonic() - started
            if waited > self.timeout_s:
                raise ClusterError(f"{self.what}: waited {waited:.0f} s for {whom}, {found} came")
            if waited > said:
                log.info("%s: waiting for %s: %d (%.0f s of %.0f s)", self.what, whom, found, waited, self.timeout_s)
                said += EVERY_S
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    # --- a receiver -----------------------------------------------------------------------------------------------------

    def arrive(self, receivers: int) -> int:
        """Say that one is there and wait for the others; returns one's number, from 1. Raises ClusterError for one too many: a
        sender that counts to `receivers` would not wait for all of them, and take a bucket back while it is read."""
        number = self._count("places", "place at the meeting")
        if number > receivers:
            raise ClusterError(f"{self.what}: {receivers} receivers were asked, and {number} came")
        self.keys.set(f"process {number}", str(os.getpid()))
        self._count("arrived", "arrival")
        self._wait(GO, "the other receivers", 2 * self.timeout_s)  # the sender gives up first, and knows who is missing
        return number

    def expect(self, bucket: int) -> tuple[int, str]:
        """Wait for the bucket; returns its digest and where it is."""
        digest, where = self._wait(f"bucket {bucket}", f"bucket {bucket}").decode().split(" ")
        return int(digest), where

    def taken(self, bucket: int) -> None:
        self._count(f"taken {bucket}", f"word that bucket {bucket} is taken")

    def fail(self, why: str) -> None:
        """Tell the sender, if it is still there."""
        if self.alone:
            return
        try:
            self.keys.set(FAILED, why[:500])
        except DistError as error:
            log.warning("%s: could not tell the sender of %s: %s", self.what, why, first_line(error))

    def _count(self, key: str, what: str) -> int:
        try:
            return self.keys.add(key, 1)
        except DistError as error:
            self.alone = True
            raise ClusterError(f"{self.what}: the sender is gone, no {what} ({first_line(error)})") from error

    def _wait(self, key: str, whom: str, timeout_s: float = 0.0) -> bytes:
        try:
            self.keys.wait([key], timedelta(seconds=timeout_s or self.timeout_s))
            return self.keys.get(key)
        except DistError as error:
            self.alone = isinstance(error, DistNetworkError)
            raise ClusterError(f"{self.what}: waited in vain for {whom} ({first_line(error)})") from error


def serve(host: str, timeout_s: float) -> tuple[TCPStore, str]:
    """A server on a free port of this machine → (it, 'host:port' to find it at); it ends when nobody holds it."""
    wait = timedelta(seconds=timeout_s)
    server = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
    return server, f"{host}:{server.port}"


def reach(address: str, timeout_s: float) -> TCPStore:
    """A sender's server. Raises ClusterError if it is not there."""
    host, port = address.rsplit(":", 1)
    try:
        return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    except DistError as error:
        raise ClusterError(f"the sender of weights at {address} is not there ({first_line(error)})") from error


def runs(process: int) -> bool:
    """Whether a process of this machine is there and not just waiting to be buried."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def first_line(error: BaseException) -> str:
    """What an error of torch says, without its stack."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
