"""Messages over a connected stream socket: four bytes of length, then JSON. Every wait has a deadline, every length a cap."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from rlpipe.errors import SandboxError

MB = 1 << 20


class Closed(Exception):
    """The other side is gone, in the middle of a message or before one."""


class Late(Exception):
    """Nothing came before the deadline."""


class Malformed(Exception):
    """What came is no message, or a larger one than allowed."""


def send(channel: socket.socket, message: Any, deadline: float | None = None, handles: tuple[int, ...] = ()) -> None:
    """JSON values only. deadline: of time.monotonic(). handles: open files that go along. Raises Closed, Late."""
    data = json.dumps(message, allow_nan=False).encode()
    send_bytes(channel, data, deadline, handles)


def send_bytes(channel: socket.socket, data: bytes, deadline: float | None = None, handles: tuple[int, ...] = ()) -> None:
    head = len(data).to_bytes(4, "little")
    try:
        _arm(channel, deadline)
        if handles:
            socket.send_fds(channel, [head], handles)
        else:
            channel.sendall(head)
        _arm(channel, deadline)
        channel.sendall(data)
    except TimeoutError:
        raise Late from None
    except OSError as error:
        raise Closed(str(error)) from None


def receive(channel: socket.socket, limit_mb: float, deadline: float | None = None) -> Any:
    """The next message. Raises Closed, Late, Malformed."""
    data = receive_bytes(channel, limit_mb, deadline)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)[:100]) from None


def receive_bytes(channel: socket.socket, limit_mb: float, deadline: float | None = None) -> bytes:
    length = int.from_bytes(receive_exactly(channel, 4, deadline), "little")
    if length > limit_mb * MB:
        raise Malformed(f"a message of {length} bytes")
    return receive_exactly(channel, length, deadline)


def receive_with_handles(channel: socket.socket, most: int, limit_mb: float) -> tuple[Any, list[int]]:
    """A message and the open files that came with it; for a trusted sender. Raises Closed, SandboxError."""
    head, handles, _, _ = socket.recv_fds(channel, 4, most)
    if not head:
        raise Closed
    if len(head) != 4:
        raise SandboxError("a job's first bytes came apart")
    length = int.from_bytes(head, "little")
    if length > limit_mb * MB:
        for handle in handles:
            os.close(handle)
        raise SandboxError(f"a job of {length} bytes; {limit_mb} MB is the most")
    return json.loads(receive_exactly(channel, length, None)), handles


def receive_exactly(channel: socket.socket, count: int, deadline: float | None) -> bytes:
    """Raises Closed, Late."""
    parts, missing = [], count
    while missing:
        try:
            _arm(channel, deadline)
            part = channel.recv(min(missing, MB))
        except TimeoutError:
            raise Late from None
        except OSError as error:
            raise Closed(str(error)) from None
        if not part:
            raise Closed
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _arm(channel: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        channel.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise Late
    channel.settimeout(left)
