"""The confined process that holds a stranger's functions and answers calls to them. It never sees a test."""

from __future__ import annotations

import ast
import socket
import sys
import types
from collections.abc import Sequence
from typing import Any

from rlpipe.sandbox import frames
from rlpipe.sandbox.values import Unsendable, decode, encode

MAX_REFERENCES = 10_000


def choose(sources: Sequence[str], entry_point: str) -> types.CodeType | None:
    """The first source that compiles and defines the entry point; else the first that compiles; None if none does."""
    compiled = []
    for source in sources:
        try:
            tree = ast.parse(source, "<answer>")
            code = compile(tree, "<answer>", "exec", dont_inherit=True)  # this file's __future__ is not the program's
        except Exception:  # nothing of the program has run: whatever the compiler says, this source is none
            continue
        if not entry_point or entry_point in _defined(tree):
            return code
        compiled.append(code)
    return compiled[0] if compiled else None


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def serve(code: types.CodeType, link: socket.socket, limit_mb: float) -> None:
    """Run the program, say whether it loaded, then answer requests, of at most limit_mb, until the other side is gone.

    A request is {"call": target, "args": …, "kwargs": …} or {"get": target, "name": …}, a target {"name": …} or {"ref": …}; a
    reply {"value": …, "args": … if they were changed in place} or {"raised": names of its classes, "text": …}.
    """
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    try:
        exec(code, module.__dict__)
    except Exception as error:
        frames.send(link, {"loaded": False} | _raised(error))
        return
    frames.send(link, {"loaded": True})
    served = _Served(module.__dict__)
    while True:
        request = frames.receive(link, limit_mb)
        try:
            reply = served.answer(request)
        except Exception as error:
            reply = _raised(error)
        frames.send(link, reply)


class _Served:
    """The names of a module, and the objects that were handed out as references."""

    def __init__(self, names: dict[str, Any]):
        self.names = names
        self.kept: list[Any] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self._target(request.get("call") or request["get"])
        if "get" in request:
            return {"value": encode(getattr(target, request["name"]), self.keep)}
        args = decode(request["args"], self._object)
        kwargs = {name: decode(value, self._object) for name, value in request["kwargs"].items()}
        result = target(*args, **kwargs)
        reply = {"value": encode(result, self.keep)}
        try:
            after = encode(args, self.keep, iterators=False)
        except Unsendable:  # an iterator, which was used up or not; nothing there to be changed in place
            return reply
        return reply if after == request["args"] else reply | {"args": after}

    def _target(self, target: dict[str, Any]) -> Any:
        return self._object(next(iter(target.values())))

    def _object(self, reference: int | str) -> Any:
        if isinstance(reference, int):
            return self.kept[reference]
        if reference not in self.names:
            raise NameError(f"name {reference!r} is not defined")
        return self.names[reference]

    def keep(self, value: Any) -> int:
        for number, known in enumerate(self.kept):
            if known is value:
                return number
        if len(self.kept) >= MAX_REFERENCES:
            raise Unsendable("too many objects")
        self.kept.append(value)
        return len(self.kept) - 1


def _raised(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)[:500]
    except Exception:
        text = ""
    return {"raised": [kind.__name__ for kind in type(error).__mro__], "text": text}
