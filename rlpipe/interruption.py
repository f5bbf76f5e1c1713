"""Being asked to end: SIGTERM, SIGUSR1 or Ctrl-C, and a run that leaves in good order.

A machine that is about to be taken away says so with a signal, seconds or minutes ahead: clouds and Kubernetes with SIGTERM,
Slurm with the one that `--signal=B:USR1@180` names, `ray job stop` with SIGTERM. The driver finishes what must not be cut in
two, saves the last finished step and leaves with `EXIT_CODE`; the same command with resume=auto goes on from there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from rlpipe.errors import Interrupted

# EX_TEMPFAIL of sysexits.h: "try again later", which is what is meant. 143 would be the obvious other choice, but shells report
# it for every process that SIGTERM killed, so it does not say that anything was saved.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_S = 1.0  # `ray job stop` signals a whole process tree, so a signal that a parent passes on as well arrives twice


class _Request:
    """What this process was asked, at most once: the first signal's name and its time on the monotonic clock."""

    def __init__(self) -> None:
        self.name, self.at = "", 0.0
        self.deferred = False  # until somebody asks with `check`, a signal ends the run on the spot
        self.before: dict[signal.Signals, Any] = {}


_request = _Request()


def install() -> None:
    """Take the signals over, in the main thread only (elsewhere this does nothing, as Python has it).

    Before the first `check` a signal raises on the spot: Interrupted, for Ctrl-C KeyboardInterrupt; nothing has been trained
    that could be saved. From then on it waits for the next `check`. One more of them, later than `ECHO_S`, ends the process
    at once. Call it again after Ray is connected, which puts a SIGTERM handler of its own there.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not _on_signal:
            _request.before.setdefault(number, signal.getsignal(number))
            signal.signal(number, _on_signal)


def uninstall() -> None:
    """What was there before, and no request."""
    global _request
    for number, handler in _request.before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _request = _Request()


def requested() -> str:
    """The name of the signal that asked this process to end, empty if none did."""
    return _request.name


def check() -> None:
    """Raises Interrupted if the process was asked to end. For places where a run may stop: between steps, while it waits."""
    _request.deferred = True
    install()
    if _request.name:
        raise Interrupted(f"{_request.name} asked the run to end")


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if not _request.name:
        _request.name, _request.at = name, time.monotonic()
        if _request.deferred:
            _say(f"{name}: the run saves what it has and ends; once more ends it at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Interrupted(f"{name} asked the run to end before it had trained anything")
    elif time.monotonic() - _request.at > ECHO_S:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _say(text: str) -> None:
    """A line on standard error; a signal handler may not enter logging, which the interrupted code could be inside of."""
    os.write(2, f"{text}\n".encode())
