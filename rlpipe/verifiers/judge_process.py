"""The process that compares mathematical answers: `python -m rlpipe.verifiers.judge_process`, driven by `judge.Judge`.

It loads the math-verify library once and forks a child that does the work, under a limit on processor time and on memory that
the kernel keeps: no signal handler, no thread, no clock that a busy machine runs past. A child that breaks its limit is gone,
and the next one is forked in a few milliseconds.

Pipes: one line of JSON in, `{"reference", "answer", "seconds"}`; one line out, `{"verdict"}` with `verdict` right | wrong |
unreadable (the reference), or `{"ended": signal}`. A reference of None only asks whether the answer can be read.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any, BinaryIO

MEMORY = 2 << 30  # bytes of address space on top of what the process has when it starts
MAX_BITS = 2.0**16  # of a number that is worth computing; a short tower of powers has more than a machine can hold
OVERTIME = "SIGPROF"
ATTEMPTS = 2  # at a pair that a child did not survive for another reason than its time: it may have been killed from outside
FACTORIALS = {"factorial", "factorial2", "subfactorial", "gamma", "RisingFactorial", "FallingFactorial"}


@lru_cache(maxsize=4096)
def read(text: str) -> tuple:
    """What the library finds in a text; empty if nothing."""
    from math_verify import parse

    return tuple(parse(text, parsing_timeout=None))


def compare(reference: str, answer: str) -> str:
    """right | wrong | unreadable, of texts that the library can search for an answer."""
    from math_verify import verify

    gold = read(reference)
    if not gold:
        return "unreadable"
    found = list(read(answer))
    if any(bits(part) > MAX_BITS for part in found):
        return "wrong"
    return "right" if verify(list(gold), found, timeout_seconds=None) else "wrong"


def bits(node: Any) -> float:
    """Roughly how many bits the value of a sympy expression takes, without computing it; 0 for texts and symbols."""
    if getattr(node, "is_Rational", False):
        return float(max(int(node.p).bit_length(), int(node.q).bit_length()))
    if not getattr(node, "args", ()):
        return 0.0
    sizes = [bits(part) for part in node.args]
    name = type(node).__name__
    if name == "Pow" and not node.args[1].free_symbols:
        return max(1.0, sizes[0]) * _power_of_two(sizes[1])
    if name in FACTORIALS:
        return sizes[0] * _power_of_two(sizes[0])
    return sum(sizes)


def _power_of_two(size: float) -> float:
    return 2.0**size if size < 64 else float("inf")


def work(requests: BinaryIO, replies: BinaryIO) -> None:
    """The child: answers until its parent closes the pipe. The clock is armed anew for every pair."""
    memory = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in requests:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # processor time; its signal ends the process
        try:
            reply = {"verdict": compare(job["reference"], job["answer"])}
        except (MemoryError, RecursionError) as error:
            reply = {"ended": type(error).__name__}
        except Exception as error:  # reported to the caller, which makes a failure of it
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        signal.setitimer(signal.ITIMER_PROF, 0.0)  # before the reply, so that no later pair pays for this one
        _reply(replies, reply)
        if "ended" in reply:
            os._exit(1)  # what is left of the heap is not worth trusting


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _reply(pipe: BinaryIO, message: dict[str, Any]) -> None:
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


class Child:
    """A forked worker and the two pipes to it."""

    def __init__(self, private: list[int]):
        ask_end, ask = os.pipe()
        answer, answer_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for descriptor in (ask, answer, *private):
                os.close(descriptor)
            try:
                work(os.fdopen(ask_end, "rb"), os.fdopen(answer_end, "wb"))
            finally:
                os._exit(0)
        os.close(ask_end)
        os.close(answer_end)
        self.ask, self.answer = os.fdopen(ask, "wb", 0), os.fdopen(answer, "rb")

    def judge(self, line: bytes) -> dict[str, Any]:
        """The reply, or how the child ended instead."""
        try:
            self.ask.write(line)
            self.ask.flush()
            reply = self.answer.readline()
        except BrokenPipeError:
            reply = b""
        if reply.endswith(b"\n"):
            return json.loads(reply)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return {"ended": signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"}

    def close(self) -> None:
        self.ask.close()
        self.answer.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # whatever the libraries print is not a reply
    import math_verify  # noqa: F401 - loaded here, so that every child has it

    logging.disable(logging.CRITICAL)
    if compare("$1$", "$\\frac{2}{2}$") != "right":  # parsers are made at their first use
        sys.exit("math-verify cannot read LaTeX here; install math-verify[antlr4_13_2]")
    os.dup2(silence, 2)
    private = [replies.fileno()]
    child = Child(private)
    _reply(replies, {"verdict": "ready"})
    for line in sys.stdin.buffer:
        for _ in range(ATTEMPTS):
            reply = child.judge(line)
            if "ended" not in reply:
                break
            child.close()
            child = Child(private)
            if reply["ended"] == OVERTIME:
                break
        _reply(replies, reply)
    child.close()


if __name__ == "__main__":
    main()
