"""The process that confined ones are forked from: a warm Python with its library loaded, which never sees a job.

It reads one byte and two sockets at a time from its own control socket: the new inmate's control channel and its lifeline. For
each it forks a warden, which forks the inmate. The warden waits for the inmate's end or for the lifeline's, whichever is first;
then it kills the inmate, and with it everything in its process namespace, and reports on the lifeline how it ended. So an
inmate ends when its judge lets go of it, and when the judge, the stem or the warden dies.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys

from rlpipe.sandbox import inmate, kernel
from rlpipe.sandbox.confinement import NAMESPACES, Plan, identity_maps

END = "<id"  # what a warden reports: exit status, negative for a signal; seconds of processor time
COMMON = (
    "abc ast bisect cmath collections contextlib copy ctypes dataclasses datetime decimal enum fractions functools hashlib "
    "heapq io itertools json math operator queue random re statistics string struct textwrap threading time traceback typing "
    "unicodedata"
).split()
UNWANTED = ("_test", "_xxtest", "xxlimited", "_tkinter", "_ctypes_test", "readline", "_curses")


def warm_up(whole_library: bool, packages: tuple[str, ...] = ()) -> None:
    """Load what programs use. whole_library: every extension module too, for inmates whose view has no shared libraries.
    packages: their folders; they are loaded for the same reason."""
    names = list(COMMON) + [os.path.basename(path) for path in packages if not path.endswith(".libs")]
    sys.path += sorted({os.path.dirname(path) for path in packages})
    if whole_library:
        folders = [path for path in sys.path if path.endswith("lib-dynload") and os.path.isdir(path)]
        names += sorted({name.split(".")[0] for folder in folders for name in os.listdir(folder)})
        names += ["socket", "ssl", "asyncio", "sqlite3"]
    for name in names:
        if not name.startswith(UNWANTED):
            try:
                importlib.import_module(name)
            except ImportError:
                pass  # a module that needs a library this machine does not have


def run(plan: Plan, control: socket.socket) -> None:
    """Until the other end of the control socket is closed."""
    warm_up(True, plan.view.packages)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # wardens need no one to collect them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the judge, which then lets go
    maps = identity_maps()
    gc.collect()
    gc.freeze()
    gc.disable()
    while True:
        word, handles, _, _ = socket.recv_fds(control, 1, 2)
        if not word:
            return
        _fork(plan, control, handles, maps)
        for handle in handles:
            os.close(handle)


def _fork(plan: Plan, control: socket.socket, handles: list[int], maps: dict[str, str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if not pid:
            try:
                ours.close()
                control.close()
                _warden(plan, *(socket.socket(fileno=handle) for handle in handles), theirs)
            finally:
                os._exit(71)
        theirs.close()
        if plan.level != "namespaces" or not ours.recv(1):
            return  # without namespaces there is nothing to map; a warden that failed has said so itself
        for name, content in maps.items():
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(content)
        ours.sendall(b"m")


def _warden(plan: Plan, channel: socket.socket, lifeline: socket.socket, stem: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    try:
        if sys.platform == "linux":
            kernel.die_with_parent()
        if plan.level == "namespaces":
            kernel.unshare(NAMESPACES)
            stem.sendall(b"u")
            if not stem.recv(1):
                raise OSError("the users of the namespace could not be mapped")
    except OSError as error:
        channel.sendall(inmate.FAILED + str(error).encode())
        os._exit(70)
    stem.close()
    pid = os.fork()
    if not pid:
        lifeline.close()
        os.setsid()
        inmate.live(plan, channel)
    channel.close()
    _wait(pid, lifeline)


def _wait(pid: int, lifeline: socket.socket) -> None:
    """Until the inmate ends or the lifeline does."""
    handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
    while True:
        watched = [lifeline] + ([handle] if handle >= 0 else [])
        ready, _, _ = select.select(watched, [], [], None if handle >= 0 else 0.02)
        ended, status, used = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if lifeline in ready:
            os.kill(pid, signal.SIGKILL)
            _, status, used = os.wait4(pid, 0)
            break
    try:
        os.killpg(pid, signal.SIGKILL)  # where no filter kept it from starting others
    except (ProcessLookupError, PermissionError):
        pass
    try:
        lifeline.sendall(struct.pack(END, os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
    except OSError:
        pass  # the judge did not wait for it
    os._exit(0)
