"""Cells: single-use confined processes, made ahead of their jobs. From the judge's side; nothing in here is confined."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlpipe.errors import SandboxError
from rlpipe.sandbox import frames, inmate, start, stem
from rlpipe.sandbox.confinement import Plan
from rlpipe.sandbox.view import DEVICES, PACKAGES, SCRATCH

log = logging.getLogger("rlpipe")
START_S = 60.0  # a stem loads the whole library first; a busy machine takes its time
PACKAGE = Path(__file__).resolve().parent.parent
ENTRY = "import sys; sys.path.insert(0, {!r}); from rlpipe.sandbox.start import main; main()"
INSIDE_BUBBLE = "/harness"
Status = tuple[int, float | None]  # exit status, negative for a signal; seconds of processor time, if known


class Cell:
    """One confined process. control: to and from its inmate; let_go: ends it; wait: for its end, until a deadline."""

    def __init__(self, control: socket.socket, let_go: Callable[[], None], wait: Callable[[float], Status]):
        self.control, self.let_go, self._wait = control, let_go, wait
        self.started = time.monotonic()
        self._ended: Status | None = None

    def status(self, deadline: float) -> Status:
        """Of its end, as often as asked. Raises Late; Closed if nobody knows."""
        self._ended = self._ended or self._wait(deadline)
        return self._ended

    def wait_until_ready(self) -> None:
        """Raises SandboxError with the inmate's own words if it could not lock itself up."""
        deadline = self.started + START_S
        try:
            word = self._take(1, deadline)
            if word == inmate.READY:
                return
            told = (b"" if word == inmate.FAILED else word) + self._take(2000, deadline)
            reason = told.decode(errors="replace").strip()
        except frames.Late:
            raise SandboxError(f"a confined process was not ready within {START_S:.0f} s") from None
        raise SandboxError(f"a process could not be confined: {reason or 'it ended without a word'}")

    def _take(self, most: int, deadline: float) -> bytes:
        self.control.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            return self.control.recv(most)
        except TimeoutError:
            raise frames.Late from None
        except OSError:
            return b""

    def give(self, job: dict[str, Any], handles: tuple[int, ...], deadline: float) -> None:
        """The job and copies of open files. Raises Closed, Late."""
        frames.send(self.control, job, deadline, handles)

    def end(self) -> None:
        """Killed, with all it started. Harmless when repeated."""
        self.control.close()
        self.let_go()


class Stem:
    """A process that forks inmates (see `stem`), restarted by whoever holds it if it dies."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.control, theirs = socket.socketpair()
        self.errors = tempfile.TemporaryFile()
        with theirs:
            python = [sys.executable, "-I", "-S", "-c", ENTRY.format(str(PACKAGE.parent))]
            self.process = subprocess.Popen(
                [*python, str(theirs.fileno()), start.pack(plan)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                env={"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # it must have no threads
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def make(self) -> Cell:
        """At once; the process comes up meanwhile. Raises SandboxError if the stem is dead."""
        control, inner_control = socket.socketpair()
        lifeline, inner_lifeline = socket.socketpair()
        with inner_control, inner_lifeline:
            try:
                socket.send_fds(self.control, [b"c"], [inner_control.fileno(), inner_lifeline.fileno()])
            except OSError:
                control.close()
                lifeline.close()
                raise SandboxError(f"the process that starts confined ones died: {self._last_words()}") from None

        def wait(deadline: float) -> Status:
            return struct.unpack(stem.END, frames.receive_exactly(lifeline, struct.calcsize(stem.END), deadline))

        return Cell(control, lifeline.close, wait)

    def _last_words(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-500:].decode(errors="replace").strip() or f"exit status {self.process.poll()}"

    def close(self) -> None:
        self.control.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


class Bubbles:
    """Inmates, each started by bubblewrap in namespaces of its own."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.program = shutil.which("bwrap") or "bwrap"
        self.thread = ThreadPoolExecutor(1, "bubbles")  # bwrap's "parent" is a thread: one that outlives every caller

    def make(self) -> Cell:
        control, theirs = socket.socketpair()
        with theirs:
            try:
                process = self.thread.submit(self._start, theirs.fileno()).result()
            except OSError as error:
                control.close()
                raise SandboxError(f"{self.program} cannot be run: {error}") from None

        def let_go() -> None:
            process.kill()
            process.wait()

        def wait(deadline: float) -> Status:
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise frames.Late from None
            return (128 - code if code > 128 else code), None

        return Cell(control, let_go, wait)

    def _start(self, handle: int) -> subprocess.Popen:
        return subprocess.Popen(
            [self.program, *self._options(), sys.executable, "-I", "-S", "-c", ENTRY.format(INSIDE_BUBBLE)]
            + [str(handle), start.pack(self.plan)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=handle,  # what bwrap itself complains of is the reason that `wait_until_ready` gives
            env={},
            pass_fds=[handle],
        )

    def _options(self) -> list[str]:
        options = "--unshare-all --unshare-user --die-with-parent --new-session --uid 1000 --gid 1000 --cap-add ALL".split()
        library = {os.path.dirname(os.path.realpath(sys.executable)), sys.base_prefix + "/lib"}
        library |= {path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64") if os.path.isdir(path)}
        for path in sorted({*library, *self.plan.view.library}):
            options += ["--ro-bind", path, path]
        for path in self.plan.view.packages:
            options += ["--ro-bind", path, f"{PACKAGES}/{os.path.basename(path)}"]
        for name in ("__init__.py", "errors.py", "sandbox"):
            options += ["--ro-bind", str(PACKAGE / name), f"{INSIDE_BUBBLE}/rlpipe/{name}"]
        if sys.prefix != sys.base_prefix:
            options += ["--ro-bind", sys.prefix + "/bin", sys.prefix + "/bin"]
        for path in DEVICES:
            options += ["--dev-bind-try", path, path]
        return [*options, "--dir", SCRATCH, "--chdir", "/", "--remount-ro", "/", "--"]

    def close(self) -> None:
        self.thread.shutdown()


class Cells:
    """`warm` cells stand ready; a used one is never used again. May be shared by threads."""

    def __init__(self, plan: Plan, warm: int = 2):
        self.plan, self.warm = plan, warm
        self.ready: deque[Cell] = deque()
        self.lock = threading.Lock()
        self.restarts = 0
        self.source = self._new_source()

    def _new_source(self) -> Stem | Bubbles:
        return Bubbles(self.plan) if self.plan.level == "bubblewrap" else Stem(self.plan)

    def take(self) -> Cell:
        """A cell that waits for its job. Raises SandboxError if none can be had, after one new start of the machinery."""
        try:
            return self._take()
        except SandboxError as error:
            self.renew(error)
            return self._take()

    def renew(self, why: Exception) -> None:
        """New machinery and new cells; those that are at work elsewhere are lost with the old."""
        log.warning("sandbox %s: starting anew: %s", self.plan.level, why)
        with self.lock:
            self.restarts += 1
            self._drop()
            self.source = self._new_source()

    def _take(self) -> Cell:
        with self.lock:
            while len(self.ready) < self.warm + 1:
                self.ready.append(self.source.make())
            cell = self.ready.popleft()
        try:
            cell.wait_until_ready()
        except SandboxError:
            cell.end()
            raise
        return cell

    def _drop(self) -> None:
        while self.ready:
            self.ready.popleft().end()
        self.source.close()

    def close(self) -> None:
        with self.lock:
            self._drop()
