"""The life of one confined process: lock up, say so, take one job, close the door, do it, end.

Jobs come as {"role": …, "cpu_s", "reply_mb", …} with open files:

- program: "sources"; standard input and output. The first source that compiles runs as `__main__`.
- answer: "sources", "entry_point"; a link. See `answer`.
- tests: what `tester.judge` takes; a link. The verdict goes out through the control channel.

Before a program or answer runs it has said {"compiled": bool} on the control channel and closed it: what runs then has nothing
of its judge in its memory and no way to reach it but its output or its link.
"""

from __future__ import annotations

import atexit
import io
import os
import socket
import sys
import threading
import types
from typing import Any

from rlpipe.errors import SandboxError
from rlpipe.sandbox import answer, frames, tester
from rlpipe.sandbox.confinement import Plan, close_door, lock_up

JOB_MB = 256
READY = b"R"
FAILED = b"F"


def live(plan: Plan, control: socket.socket) -> None:
    """Never returns. The exit status is that of the program, 0 at the end of the tests, 70 if the sandbox itself failed."""
    status = 70
    try:
        status = _live(plan, control)
    except (frames.Closed, frames.Malformed):
        pass  # the judge, or the tests, lost interest
    except BaseException as error:  # said in words: this process's standard error goes nowhere
        try:
            control.sendall(FAILED + f"{type(error).__name__}: {error}".encode()[:2000])
        except OSError:
            pass
    finally:
        os._exit(status)


def _live(plan: Plan, control: socket.socket) -> int:
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # what a function prints is of no interest
        os.dup2(nothing, number)
    os.closerange(3, control.fileno())
    os.closerange(control.fileno() + 1, 4096)
    lock_up(plan)
    control.sendall(READY)
    job, handles = frames.receive_with_handles(control, 2, JOB_MB)
    close_door(plan.level, job["cpu_s"])
    if job["role"] == "tests":
        with socket.socket(fileno=handles[0]) as link:
            frames.send(control, tester.judge(job, link, job["reply_mb"]))
        return 0
    code = answer.choose(job["sources"], job.get("entry_point", ""))
    frames.send(control, {"compiled": code is not None})
    control.close()
    if code is None:
        return 0
    if job["role"] == "program":
        return _run_program(code, handles)
    if job["role"] != "answer":
        raise SandboxError(f"there is no role {job['role']}")
    with socket.socket(fileno=handles[0]) as link:
        answer.serve(code, link, JOB_MB)  # what the tests ask is as trusted as the job
    return 0


def _run_program(code: types.CodeType, handles: list[int]) -> int:
    """As `python program.py` would: threads are waited for, what was registered at exit runs, output is flushed."""
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    given, output = io.BufferedReader(io.FileIO(0, closefd=False)), io.BufferedWriter(io.FileIO(1, "w", closefd=False))
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(given, encoding="utf8", errors="surrogateescape")
    sys.stdout = sys.__stdout__ = first = io.TextIOWrapper(output, encoding="utf8", errors="surrogateescape")
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    status: Any = 0
    try:
        exec(code, module.__dict__)
    except SystemExit as end:
        status = end.code
    except BaseException:
        status = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, first):  # a program may put its own in place, and still print to the first
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
    except BaseException:
        status = 1
    return status if isinstance(status, int) else int(status is not None)
