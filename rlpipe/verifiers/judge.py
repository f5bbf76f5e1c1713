"""A verifier's own process for comparisons that may never end, and the pipe to it."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from rlpipe.errors import VerifierFailed

log = logging.getLogger("rlpipe")

START_S = 120.0  # to load the library, on a busy machine
WAIT_FACTOR = 20.0  # a pair may take so many times its processor time by the clock, before the process counts as stuck
EVERY_S = 10.0


class UnreadableReference(VerifierFailed):
    """The reference answer of a record cannot be read at all, or not within the limits."""


class Judge:
    """Compares answers in a process of its own, from any thread. Waits for: the process, at most `seconds` of processor time a
    pair. Consumes: (reference, answer). Produces: right, wrong, unreadable, or that the answer broke its limits.

    It starts in the background with `start()`, otherwise at the first pair; it ends with the process that made it.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.ready = False
        self.lock = threading.Lock()

    def start(self) -> None:
        """Without waiting for it."""
        if self.process is not None:
            return
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlpipe.verifiers.judge_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # until it is ready; then it has none
            env=os.environ | {"PYTHONPATH": path},
            bufsize=0,
        )
        self.ready = False

    def compare(self, reference: str, answer: str, seconds: float) -> str:
        """right | wrong | unreadable (the reference) | overtime: the answer took more than `seconds` of processor time, or more
        memory than a comparison gets, or made the library fail, and the reference alone does not. Raises UnreadableReference if
        the reference is what breaks the limits, VerifierFailed if the process cannot be had or gives no reply."""
        with self.lock:
            reply = self._ask(reference, answer, seconds)
            if "verdict" in reply:
                return reply["verdict"]
            alone = self._ask(reference, "$1$", seconds)
            if "ended" in alone:
                raise UnreadableReference(
                    f"the reference answer {reference[:200]!r} takes more than {seconds:g} s or too much memory to be read "
                    f"({alone['ended']}); correct it, or raise verifier.options.seconds"
                )
            if self._verdict(alone, reference) == "unreadable":
                return "unreadable"
        log.info("math: an answer of %d characters was given up (%s)", len(answer), reply.get("ended") or reply.get("error"))
        return "overtime"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                pipe.close()
        self.process, self.ready = None, False

    def _verdict(self, reply: dict[str, Any], reference: str) -> str:
        if "verdict" not in reply:
            raise VerifierFailed(f"comparing with the reference answer {reference[:200]!r} failed: {reply.get('error', reply)}")
        return reply["verdict"]

    def _ask(self, reference: str, answer: str, seconds: float) -> dict[str, Any]:
        self.start()
        if not self.ready:
            self._receive(START_S, "the judge of mathematical answers to start")
            self.ready = True
        line = json.dumps({"reference": reference, "answer": answer, "seconds": seconds}).encode() + b"\n"
        try:
            self.process.stdin.write(line)
        except BrokenPipeError:
            self._give_up("the judge of mathematical answers is gone")
        return self._receive(WAIT_FACTOR * seconds, "the judge of mathematical answers")

    def _receive(self, timeout_s: float, what: str) -> dict[str, Any]:
        """The next line. Raises VerifierFailed, with the process ended, if none comes in time."""
        deadline, received, output = time.monotonic() + timeout_s, b"", self.process.stdout
        started = time.monotonic()
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                self._give_up(f"waited {timeout_s:g} s for {what} in vain")
            if not select.select([output], [], [], min(left, EVERY_S))[0]:
                log.info("waiting for %s (%.0f s)", what, time.monotonic() - started)
                continue
            piece = os.read(output.fileno(), 65536)
            if not piece:
                last = self.process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
                self._give_up(f"{what}: the process ended; {last[0] if last else 'it may have been killed'}")
            received += piece
        return json.loads(received)

    def _give_up(self, reason: str) -> None:
        self.close()
        raise VerifierFailed(f"{reason}; it is started anew for the next pair")
