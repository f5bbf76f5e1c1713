"""Programs that pass tests, run in the sandbox."""

from __future__ import annotations

import ast
import atexit
import dataclasses
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlpipe.errors import DataError, SandboxError, VerifierFailed
from rlpipe.sandbox.judge import Verdict
from rlpipe.sandbox.limits import limits_from
from rlpipe.sandbox.sandbox import Sandbox
from rlpipe.sandbox.tester import complete
from rlpipe.trajectory import Prompt

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)(?![\w+-])[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON = ("python", "py", "python3", "")
KEEPS_BLOCK = re.compile(r"[ \t\r\n)\]}#@]|def |class |import |from |async def ")  # first characters of lines of a completion
JUDGED_AGAIN = 3  # times an answer that ends its tests' process is run, a harmless one in its place included
MAX_TIMEOUTS = 3  # of one response, when all its tests are run; the rest then count as failed
FIELDS = {
    "check": {"entry_point": str, "check": str},
    "asserts": {"asserts": list},
    "stdio": {"inputs": list, "outputs": list},
}


@dataclass
class Code:
    """A verifier with settings. Example: `Code(sandbox="strict", limits={"cpu_s": 2.0})`.

    sandbox: auto | strict | weak. limits: fields of `rlpipe.sandbox.limits.Limits`. partial: the reward is the share of tests
    that pass (asserts and inputs; a `check` is one test), and `correct` says whether all do. Opened at the first use.
    """

    sandbox: str = "auto"
    limits: dict[str, Any] = field(default_factory=dict)
    partial: bool = False
    _open: Sandbox | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def prepare(self) -> Sandbox:
        """The sandbox, opened. Raises SandboxError if the one asked for cannot be had here; ConfigError for a wrong setting."""
        with self._lock:
            if self._open is None:
                self._open = Sandbox(self.sandbox, limits_from(self.limits))
                atexit.register(self.release)
            return self._open

    def release(self) -> None:
        """Ends every confined process. Harmless when repeated; the next use opens a new sandbox."""
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    def check(self, prompt: Prompt) -> None:
        """Raises DataError, naming the field, for tests that cannot be run."""
        check_tests(prompt.answer.get("tests"))

    def longest(self, prompt: Prompt) -> float:
        """Seconds: every program that is run for a response, should each of them end just before its time is up."""
        tests = prompt.answer.get("tests")
        if not isinstance(tests, dict):
            return 0.0  # judging it says what is wrong
        runs = len(tests["inputs"]) if isinstance(tests.get("inputs"), list) else JUDGED_AGAIN
        limit = tests.get("time_limit_s")
        return runs * limits_from(self.limits).for_record(limit if isinstance(limit, (int, float)) else None).deadline_s

    def __call__(self, prompt: Prompt, response: str) -> dict[str, float]:
        """reward 1 if the response's program passes all tests of prompt.answer["tests"], else 0; with it `compiled` (0:
        there is no Python program in it) and `timeout`.

        Raises VerifierFailed, naming the record, if its tests are wrong or the sandbox broke: never a reward of 0.
        """
        try:
            verdict = self._judge(check_tests(prompt.answer.get("tests")), response)
        except (SandboxError, DataError) as error:
            raise VerifierFailed(f"verifier code: {prompt.uid}: {error}") from error
        parts = {
            "reward": verdict.share if self.partial else float(verdict.passed),
            "compiled": float(verdict.cause != "syntax"),
            "timeout": float(verdict.cause == "timeout"),
        }
        return parts | ({"correct": float(verdict.passed)} if self.partial else {})

    def _judge(self, tests: dict[str, Any], response: str) -> Verdict:
        sandbox, sources = self.prepare(), programs(response, tests["prefix"])
        if tests["kind"] != "stdio":
            tests = tests | {"all": self.partial}
            return sandbox.functions(sources, tests.get("entry_point", ""), tests, tests.get("time_limit_s"))
        passed, failed, timeouts = 0, None, 0
        for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True):
            verdict = sandbox.program(sources, given, wanted, tests.get("time_limit_s"), tests.get("tolerance", 0.0))
            passed += verdict.passed
            failed = failed if verdict.passed else failed or verdict
            timeouts += verdict.cause == "timeout"
            if failed and not self.partial or verdict.cause == "syntax" or timeouts == MAX_TIMEOUTS:
                break
        share = passed / len(tests["inputs"])
        return Verdict(True, share=1.0) if failed is None else dataclasses.replace(failed, share=share)


verify = Code()


def programs(response: str, prefix: str = "") -> list[str]:
    """What in a response may be the program, best first; the sandbox takes the first that compiles and defines the function.

    The last fenced block of Python (or of no named language) wins; a fence that is never closed runs to the end; without one,
    the whole response. A block is taken as it is, after the prefix's imports and other functions; a response without one is
    also tried as the continuation of the prefix, in full and up to the first line that leaves the function.
    """
    blocks = [code for language, code in FENCE.findall(response) if language.lower() in PYTHON]
    whole = blocks[-1] if blocks else response
    if not prefix:
        return [whole]
    head = complete(prefix)
    continued = [prefix + text for text in (whole, _cut(whole))]
    standing = f"{head.rstrip()}\n\n{whole}"
    if blocks or whole.lstrip() == whole:
        return list(dict.fromkeys([standing, *continued]))
    return list(dict.fromkeys([*continued, standing]))


def _cut(text: str) -> str:
    """Up to the first line, after the first, that neither belongs to a block nor begins one."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines[1:], 1):
        if not KEEPS_BLOCK.match(line):
            return "".join(lines[:number])
    return text


def check_tests(tests: Any) -> dict[str, Any]:
    """Tests with defaults filled in. Raises DataError that names the field; tests that do not compile too.

    {"kind": "check", "entry_point", "check": source of check(candidate), "prefix": source before the completion} |
    {"kind": "asserts", "asserts": [source, …], "setup": source} | {"kind": "stdio", "inputs": […], "outputs": […],
    "tolerance": of printed numbers}; each may have "time_limit_s": seconds of processor time, for stdio of each input.
    """
    if not isinstance(tests, dict) or tests.get("kind") not in FIELDS:
        raise DataError(f"answer.tests: an object whose kind is one of {', '.join(FIELDS)}, not {str(tests)[:80]}")
    for name, kind in FIELDS[tests["kind"]].items():
        value = tests.get(name)
        texts = value if kind is list else [value]
        if not isinstance(value, kind) or not value or not all(isinstance(text, str) for text in texts):
            raise DataError(f"answer.tests.{name}: {'texts' if kind is list else 'a text'}, and not empty")
    if tests["kind"] == "stdio" and len(tests["inputs"]) != len(tests["outputs"]):
        raise DataError(f"answer.tests: {len(tests['inputs'])} inputs and {len(tests['outputs'])} outputs")
    limit = tests.get("time_limit_s")
    if limit is not None and (not isinstance(limit, (int, float)) or not 0 < limit <= 3600):
        raise DataError(f"answer.tests.time_limit_s={limit!r}: seconds, above 0 and at most an hour")
    tolerance = tests.get("tolerance")
    if tolerance is not None and (type(tolerance) not in (int, float) or not 0 <= tolerance < math.inf):
        raise DataError(f"answer.tests.tolerance={tolerance!r}: a number, 0 or more")
    for name in ("prefix", "setup"):
        if not isinstance(tests.get(name), (str, type(None))):
            raise DataError(f"answer.tests.{name}: a text, not {tests[name]!r:.80}")
    tests = {"prefix": "", "setup": ""} | {name: value for name, value in tests.items() if value is not None}
    sources: list[tuple[str, str]] = [("check", tests.get("check", "")), ("setup", tests["setup"])]
    sources += [(f"asserts[{i}]", source) for i, source in enumerate(tests.get("asserts", ()))]
    for name, source in [*sources, ("prefix", complete(tests["prefix"]))]:
        _parse(name, source)
    return tests


def _parse(name: str, source: str, parse: Callable[[str], Any] = ast.parse) -> None:
    try:
        parse(source)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"answer.tests.{name} is not Python: {error}") from None
