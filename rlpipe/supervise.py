"""A small parent that keeps a run going: `python -m rlpipe.supervise [retries=5] [wait_s=2] -- python -m rlpipe.run recipe=…`.

It starts the command and starts it again when it dies: by a signal (killed, out of memory, crashed) or with exit code 1. It
does not after 0 (done), 2 (the recipe, data or model is not usable), 75 and 143 (asked to end: whoever asked starts it again
elsewhere) or 130 (Ctrl-C), and leaves with that code. A signal that asks for the end is passed on to the run, which saves and
leaves.

A run of `rlpipe.run` or `rlpipe.sft` is pinned: every attempt gets the same run_id and resume=auto, so that it continues its
own checkpoints and not those of whatever run of the recipe is the latest. Other commands are repeated as they stand.

retries: deaths in a row that got no further than those before, in steps; one that got further starts the count anew. Three
deaths in a row after the same step are no accident and end it sooner. wait_s: before the first restart, doubled with every
death.

Neither Ray nor torch is loaded. If this process is killed, the run dies with it: nothing goes on unwatched.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rlpipe import interruption, recipe
from rlpipe.errors import CheckpointError, ConfigError
from rlpipe.monitor.latest import latest_run
from rlpipe.monitor.metrics import read_metrics
from rlpipe.run_names import folders_of, free_folder, own_id

PINNED = ("rlpipe.run", "rlpipe.sft")
SAME_STEP = 3  # deaths in a row after the same step
LONGEST_WAIT_S = 60.0
PR_SET_PDEATHSIG = 1  # of prctl(2), which is looked up before any fork
_prctl = ctypes.CDLL(None).prctl
USAGE = "python -m rlpipe.supervise [retries=5] [wait_s=2] -- python -m rlpipe.run recipe=NAME …"


@dataclass
class Attempts:
    """What the deaths so far say about another attempt."""

    retries: int
    wait_s: float
    deaths: int = 0  # in a row without progress
    same: int = 0  # in a row after the same step, the furthest so far
    best: int = -1  # the furthest step of all attempts
    last: int | None = None

    def refusal(self, step: int | None) -> str:
        """Counts a death. step: the last one that the attempt logged, None if it logged none. Empty: try again; else why
        not."""
        further = step is not None and step > self.best
        self.same = self.same + 1 if step is not None and step == self.last == self.best else 1
        self.deaths = 1 if further else self.deaths + 1
        self.best, self.last = max(self.best, -1 if step is None else step), step
        if step is not None and self.same >= SAME_STEP:
            return f"it died {self.same} times in a row after step {step}"
        if self.deaths > self.retries:
            return f"it died {self.deaths} times in a row without getting further (retries={self.retries})"
        return ""

    def pause_s(self) -> float:
        return min(self.wait_s * 2 ** (self.deaths - 1), LONGEST_WAIT_S)


def ended(code: int) -> str:
    """How a process ended. code: as of `Popen.returncode`, or 128 + signal as a shell reports it."""
    number = -code if code < 0 else code - 128
    if number in {int(known) for known in signal.Signals}:
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with exit code {code}"


def is_death(code: int) -> bool:
    """Whether an exit asks for another attempt."""
    asked = {interruption.EXIT_CODE, 130, 143, -signal.SIGINT, -signal.SIGTERM}
    return code not in asked and (code == 1 or code < 0 or code > 128)


def pin(command: list[str]) -> tuple[list[str], Path | None]:
    """(the command that every attempt runs, the folder of the run that it makes or continues; None if that is not known).

    resume=auto without a run_id names the latest run as it is now, resume=…/latest likewise; resume=FOLDER is pinned already.
    Raises ConfigError if the recipe cannot be read.
    """
    found = [index for index, word in enumerate(command) if word in PINNED and command[index - 1] == "-m"]
    words = command[found[0] + 1 :] if found else []
    if not found or not words or any("=" not in word for word in words) or {"help=true", "dry_run=true"} & set(words):
        return command, None
    cfg = recipe.load(words)
    home = Path(cfg.output_dir) / cfg.name
    if cfg.resume not in ("auto", "never"):
        folder = Path(cfg.resume)
        if not folder.is_symlink():
            return command, folder
        return [*command, f"resume={folder.resolve()}"], folder.resolve()
    name = cfg.run_id if cfg.resume == "auto" else ""
    if cfg.resume == "auto" and not name:
        if cfg.checkpoint.path:  # of a machine that may be gone: the run finds out which was the latest
            return command, home
        latest = latest_run(home)
        if latest is not None and any(latest.glob("checkpoints/step_*")):
            name = own_id(latest) or latest.name
    name = name or free_folder(home, cfg.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").name
    return [*command, f"run_id={name}", "resume=auto"], home / name


def metrics_of(folder: Path | None) -> Path | None:
    """metrics.jsonl of the run at `folder` (of `pin`): in it, in the last one called after it, or in the latest below it."""
    if folder is None:
        return None
    known = [*reversed(folders_of(folder.parent, folder.name)), folder, latest_run(folder) or folder]
    return next((one / "metrics.jsonl" for one in known if (one / "metrics.jsonl").exists()), None)


def state_of(path: Path | None) -> tuple[Path, int, int] | None:
    """What changes when something is written to a file. Clocks of machines are not compared: storage has its own."""
    try:
        return None if path is None else (path, path.stat().st_mtime_ns, path.stat().st_size)
    except OSError:
        return None


def last_step(folder: Path | None, before: tuple[Path, int, int] | None) -> int | None:
    """The last step in the metrics of a run; None if nothing was written there since `state_of` gave `before`."""
    path = metrics_of(folder)
    if path is None or state_of(path) == before:
        return None
    try:
        lines = read_metrics(path)
    except CheckpointError:
        return None
    return lines[-1]["step"] if lines else None


class Child:
    """One attempt: a process in a process group of its own, which dies with this one."""

    def __init__(self, command: list[str]):
        self.last_line = ""
        parent = os.getpid()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, process_group=0, preexec_fn=lambda: _die_with(parent))
        self.reader = threading.Thread(target=self._copy, args=(self.process.stderr,), daemon=True)
        self.reader.start()

    def _copy(self, pipe: IO[bytes]) -> None:
        """The run's errors go where ours go; the last line of them is the cause that a restart names."""
        for line in pipe:
            self.last_line = line.decode(errors="replace").strip() or self.last_line
            with contextlib.suppress(OSError):  # nobody may listen any more; a pipe that is not emptied would stop the run
                os.write(2, line)

    def wait(self) -> int:
        code = self.process.wait()
        self.reader.join(timeout=2.0)  # a grandchild may hold the pipe open
        return code


def _die_with(parent: int) -> None:
    """In the child, before it becomes the command: SIGKILL as soon as the parent is gone."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Supervisor:
    """Starts the command until it is done, asked to end, or dies too often. `run` returns the exit code."""

    def __init__(self, command: list[str], retries: int, wait_s: float):
        self.command, self.folder = pin(command)
        self.attempts = Attempts(retries, wait_s)
        self.child: Child | None = None
        self.asked = threading.Event()
        self.signal = 0

    def run(self) -> int:
        for number in interruption.SIGNALS:
            signal.signal(number, self._pass_on)
        for attempt in itertools.count(1):
            if self.asked.is_set():
                return self._left(interruption.EXIT_CODE)
            before = state_of(metrics_of(self.folder))
            self.child = Child(self.command)
            if self.asked.is_set():  # it came between the two lines above
                self.child.process.send_signal(self.signal)
            code = self.child.wait()
            if self.asked.is_set():
                return self._left(code)
            if not is_death(code):
                return code if code >= 0 else 128 - code
            if not self._again(attempt, code, last_step(self.folder, before)):
                return code if code > 0 else 128 - code
        return 1

    def _again(self, attempt: int, code: int, step: int | None) -> bool:
        """Say what happened, in one line, and wait; whether there is another attempt. step: the last one that it logged."""
        where = "before its first step" if step is None else f"after step {step}"
        cause = f"attempt {attempt} {ended(code)} {where}" + (f" ({self.child.last_line})" if self.child.last_line else "")
        refusal = self.attempts.refusal(step)
        if refusal:
            say(f"{cause}; giving up: {refusal}")
            return False
        pause = self.attempts.pause_s()
        say(f"{cause}; again in {pause:g} s (retry {self.attempts.deaths} of {self.attempts.retries} without getting further)")
        self.asked.wait(pause)
        return True

    def _left(self, code: int) -> int:
        """The exit code after a signal: the run's own if it says how it left, else that it was asked to."""
        if code in (0, 1, 2, interruption.EXIT_CODE):
            return code
        return 130 if self.signal == signal.SIGINT else interruption.EXIT_CODE

    def _pass_on(self, number: int, frame: object) -> None:
        """To the run alone and not to its group: a local Ray beside it must live on until the run has saved."""
        self.signal = number
        self.asked.set()
        if self.child is not None and self.child.process.poll() is None:
            self.child.process.send_signal(number)


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def settings(arguments: list[str]) -> tuple[list[str], int, float]:
    """(command, retries, wait_s) of the command line. Raises ConfigError."""
    if "--" not in arguments or not arguments[arguments.index("--") + 1 :]:
        raise ConfigError(f"say which command to keep going, after --: {USAGE}")
    cut = arguments.index("--")
    given = dict(recipe.split(argument) for argument in arguments[:cut])
    unknown = sorted(given.keys() - {"retries", "wait_s"})
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such setting; those of the run come after --: {USAGE}")
    try:
        retries, wait_s = int(given.get("retries", 5)), float(given.get("wait_s", 2.0))
    except ValueError as error:
        raise ConfigError(f"{error}; retries is a whole number, wait_s seconds: {USAGE}") from error
    if retries < 0 or not 0 <= wait_s < float("inf"):
        raise ConfigError(f"retries={retries} wait_s={wait_s:g} must not be negative: {USAGE}")
    return arguments[cut + 1 :], retries, wait_s


def main(arguments: list[str]) -> int:
    if {"help=true", "--help", "-h"} & set(arguments[: arguments.index("--") if "--" in arguments else None]):
        print(__doc__)
        return 0
    try:
        command, retries, wait_s = settings(arguments)
        supervisor = Supervisor(command, retries, wait_s)
    except ConfigError as error:
        say(f"error: {error}")
        return 2
    if supervisor.command != command:
        say(f"keeping {shlex.join(supervisor.command)} going; it leaves its results in {supervisor.folder}")
    try:
        return supervisor.run()
    except FileNotFoundError as error:
        say(f"error: {error.filename}: there is no such command")
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
