"""The confined process that runs a data set's tests against an answer that lives in another process.

The tests hold a stand-in for each of the answer's functions; what comes back over the link is plain data of exact built-in
types, or a `Remote`, which equals nothing but itself. The verdict leaves by a channel of its own, which no answer can reach.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import socket
import sys
import types
from dataclasses import dataclass
from typing import Any

from rlpipe.sandbox import frames
from rlpipe.sandbox.values import TooDeep, Unsendable, decode, encode, reflect

ALIASES = {"np": "numpy"}


class Gone(BaseException):
    """The answer's process ended, broke the protocol, or could not be loaded. No `except Exception` of a test catches it."""


class BrokenTest(BaseException):
    """The tests themselves are wrong: not the answer's fault."""


class AnswerError(Exception):
    """The answer raised an exception of its own kind."""


@dataclass
class Link:
    """The other process. calls: how many requests it answered; gone: why it cannot answer any more; passed: tests so far."""

    channel: socket.socket
    limit_mb: float
    calls: int = 0
    gone: str = ""
    passed: int = 0

    def load(self) -> None:
        """Raises Gone, and nothing else: no test has run yet, so anything else would look like the tests' own fault."""
        try:
            first = self._receive()
            loaded, told = first.get("loaded"), f"{_first_text(first.get('raised'))} {_text(first.get('text'))}"
        except Exception:
            self._lose("its first words cannot be read")
        if not loaded:
            self._lose(f"it failed when it was loaded: {told}")

    def request(self, message: dict[str, Any], args: tuple = ()) -> Any:
        if self.gone:
            raise Gone(self.gone)
        try:
            frames.send(self.channel, message)
        except frames.Closed:
            self._lose("its process ended")
        reply = self._receive()
        self.calls += 1
        if "raised" in reply:
            raise _exception(reply["raised"], reply.get("text"))
        try:
            value = decode(reply.get("value"), self._remote)
            if "args" in reply:
                reflect(args, tuple(decode(reply["args"], self._remote)))
        except (Unsendable, RecursionError, MemoryError, TypeError) as error:
            self._lose(f"its result is no value: {error}")
        return value

    def _receive(self) -> dict[str, Any]:
        try:
            reply = frames.receive(self.channel, self.limit_mb)
        except frames.Closed:
            self._lose("its process ended")
        except (frames.Malformed, MemoryError) as error:
            self._lose(f"it sent no proper reply: {error}")
        if not isinstance(reply, dict):
            self._lose("it sent no proper reply")
        return reply

    def _remote(self, number: Any) -> Remote:
        if type(number) is not int:
            raise Unsendable("not a reference")
        return Remote(self, {"ref": number})

    def _lose(self, why: str) -> None:
        self.gone = why
        raise Gone(why)


class Remote:
    """A function, class or object of the answer. It can be called and its attributes read; it equals only itself."""

    __slots__ = ("_link", "_target")

    def __init__(self, link: Link, target: dict[str, Any]):
        self._link, self._target = link, target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            packed = encode(list(args), _reference)
            named = {name: encode(value, _reference) for name, value in kwargs.items()}
        except TooDeep as error:
            raise ValueError(str(error)) from None  # an answer's own result may come back as an argument
        except Unsendable as error:
            raise BrokenTest(f"an argument cannot be sent to the answer: {error}") from None
        return self._link.request({"call": self._target, "args": packed, "kwargs": named}, args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.request({"get": self._target, "name": name})


def _reference(value: Any) -> int | str:
    """Of something of the answer that goes back to it: its number, or its name."""
    if isinstance(value, Remote):
        return next(iter(value._target.values()))
    raise Unsendable(f"a value of type {type(value).__name__}")


def judge(job: dict[str, Any], channel: socket.socket, limit_mb: float) -> dict[str, Any]:
    """{"verdict": passed | failed | broken, "reason", "calls", "gone", "share"}. broken: the tests are wrong.

    job: kind "check" with entry_point, check and prefix, or kind "asserts" with asserts and setup; "all": go on after an assert
    that fails, and fail at the end with the share of those that passed.
    """
    link = Link(channel, limit_mb)
    try:
        (_run_check if job["kind"] == "check" else _run_asserts)(job, link)
    except BrokenTest as error:
        verdict, reason = "broken", str(error)
    except Gone as error:
        verdict, reason = "failed", str(error)
    except Exception as error:
        verdict = "failed" if link.calls else "broken"
        reason = _said(error)
    else:  # a test that swallowed everything does not hide that the answer was gone, or never asked
        verdict = "failed" if link.gone else "passed" if link.calls else "broken"
        reason = link.gone or ("" if link.calls else "the tests never called the answer")
    share = link.passed / len(job["asserts"]) if job["kind"] == "asserts" else float(verdict == "passed")
    return {"verdict": verdict, "reason": reason[:1000], "calls": link.calls, "gone": bool(link.gone), "share": share}


def _run_check(job: dict[str, Any], link: Link) -> None:
    names = _execute("the prefix", complete(job["prefix"]), {"__name__": "tests"})
    candidate = names[job["entry_point"]] = Remote(link, {"name": job["entry_point"]})  # some tests call it by its name
    _execute("the tests", job["check"], names)
    if not callable(names.get("check")):
        raise BrokenTest("the tests define no function check(candidate)")
    link.load()
    names["check"](candidate)


def _run_asserts(job: dict[str, Any], link: Link) -> None:
    codes = [_compiled(f"test {i}", source) for i, source in enumerate(job["asserts"])]
    setup = _compiled("the setup", job["setup"])
    names: dict[str, Any] = {"__name__": "tests"}
    names |= names_of_tests("\n".join([job["setup"], *job["asserts"]]), link)
    link.load()
    exec(setup, names)
    failure = None
    for code in codes:
        try:
            exec(code, names)
            link.passed += not link.gone  # a test that catches everything may go on without an answer
        except Exception as error:
            failure = failure or error
            if not job.get("all"):
                break
    if failure is not None:
        raise failure


def complete(prefix: str) -> str:
    """The prefix, with a body if it ends in the head of a function."""
    try:
        ast.parse(prefix)
        return prefix
    except SyntaxError:
        return prefix + "\n    pass\n"


def names_of_tests(source: str, link: Link) -> dict[str, Any]:
    """What free names stand for: modules that the tests forgot to import (an answer must not lend its own `math` to the tests
    that judge it), else things of the answer."""
    names: dict[str, Any] = {}
    bases = {node.value.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute) and _is_name(node.value)}
    for name in free_names(source):
        names[name] = Remote(link, {"name": name})
        if name in bases and (name in sys.stdlib_module_names or name in ALIASES):
            with contextlib.suppress(ImportError):
                names[name] = importlib.import_module(ALIASES.get(name, name))
    return names


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name)


def free_names(source: str) -> list[str]:
    """Names that tests use and do not make: those of the answer."""
    made, used = set(dir(builtins)) | {"__name__"}, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used.append(node.id)
            else:
                made.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add(node.asname or node.name.split(".")[0])
    return list(dict.fromkeys(name for name in used if name not in made))


def _compiled(what: str, source: str) -> types.CodeType:
    try:
        return compile(source, f"<{what}>", "exec", dont_inherit=True)  # this file's __future__ is not that of the tests
    except (SyntaxError, ValueError) as error:
        raise BrokenTest(f"{what}: {error}") from None


def _execute(what: str, source: str, names: dict[str, Any]) -> dict[str, Any]:
    code = _compiled(what, source)
    try:
        exec(code, names)
    except Exception as error:
        raise BrokenTest(f"{what} cannot be run: {_said(error)}") from None
    return names


def _exception(names: Any, text: Any) -> Exception:
    """The nearest built-in exception of those names; SystemExit and its kin are no exceptions to be expected of an answer.

    StopIteration becomes a RuntimeError, as it does in a generator: it would end the loop of a test, `all(map(f, cases))`.
    """
    message = _text(text)
    for name in names if isinstance(names, list) else []:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                if issubclass(kind, (StopIteration, StopAsyncIteration)):
                    return RuntimeError(f"the answer raised {name}")
                return AnswerError(message) if kind is Exception else kind(message)
            except TypeError:
                continue  # UnicodeDecodeError and its like want more
    return AnswerError(message)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _first_text(names: Any) -> str:
    return _text(names[0])[:100] if isinstance(names, list) and names else ""


def _said(error: Exception) -> str:
    """An exception's kind and text; `assert f(2) == 4, f(2)` makes texts of values that have none, such as a huge number."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__
