"""Values that cross between two confined processes: plain data, rebuilt on the other side from exact built-in types.

Nothing that comes out of `decode` can run a stranger's code: a subclass with a lying `__eq__` arrives as the number, text or
list it was made of. What is no plain data (a class, a closure, an instance) crosses as a reference, and stays where it is.

On the wire JSON: null, booleans, finite floats, integers below 2**64, texts and lists as themselves; everything else is an
object with one key, the kind: {"tuple": […]}, {"dict": [[key, value], …]}, {"int": "hex"}, {"float": "nan"}, {"ref": 3} …
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

MAX_DEPTH = 100
MAX_ITEMS = 1_000_000  # of an iterator, which may have no end


class Unsendable(Exception):
    """A value that cannot cross: no plain data, nested too deep, or an iterator without an end."""


class TooDeep(Unsendable):
    """A value that is nested deeper than `MAX_DEPTH`."""


def refuse(value: Any) -> int:
    raise Unsendable(f"a value of type {type(value).__name__} cannot be sent")


def encode(value: Any, keep: Callable[[Any], int | str] = refuse, *, iterators: bool = True, depth: int = 0) -> Any:
    """JSON for a value. keep(object): the number, or the name, of a reference to it.

    iterators: take them to their end, else refuse them.

    Raises Unsendable, and whatever a stranger's object raises when it is looked at.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if value.bit_length() <= 64 else {"int": format(value, "x")}
    if kind is float:
        return value if value - value == 0.0 else {"float": repr(value)}
    if depth >= MAX_DEPTH:
        raise TooDeep(f"nested deeper than {MAX_DEPTH}")

    def each(items: Any) -> list:
        return [encode(item, keep, iterators=iterators, depth=depth + 1) for item in items]

    if kind is list:
        return each(value)
    if kind is tuple:
        return {"tuple": each(value)}
    if kind is dict:
        return {"dict": [each(pair) for pair in value.items()]}
    if kind in (set, frozenset, deque):
        return {kind.__name__: each(value)}
    return _encode_rare(value, kind, each, keep, iterators)


def _encode_rare(value: Any, kind: type, each: Callable, keep: Callable[[Any], int | str], iterators: bool) -> Any:
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": each((value.real, value.imag))}
    if kind is range:
        return {"range": each((value.start, value.stop, value.step))}
    if kind is Decimal:
        return {"Decimal": str(value)}
    if kind is Fraction:
        return {"Fraction": each((value.numerator, value.denominator))}
    if kind is type(...):
        return {"ellipsis": 0}
    for base in (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, deque):
        if issubclass(kind, base):
            plain = base(value)
            return encode(plain if type(plain) is base else refuse(value), keep, iterators=iterators, depth=1)
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return each((value.item(),))[0]
    if isinstance(value, Iterator):
        items = list(islice(value, MAX_ITEMS + 1)) if iterators else refuse(value)
        return {"iterator": each(items)} if len(items) <= MAX_ITEMS else refuse(value)
    return {"ref": keep(value)}


def _no_reference(reference: Any) -> Any:
    raise Unsendable("a reference, where none can be")


def decode(data: Any, fetch: Callable[[Any], Any] = _no_reference, depth: int = 0) -> Any:
    """The value of what `encode` made. fetch(content): the object of a reference, which may be anything.

    Raises Unsendable for anything else.
    """
    kind = type(data)
    if data is None or kind in (bool, int, float, str):
        return data
    if depth > MAX_DEPTH:
        raise TooDeep(f"nested deeper than {MAX_DEPTH}")
    if kind is list:
        return [decode(item, fetch, depth + 1) for item in data]
    if kind is not dict or len(data) != 1:
        raise Unsendable("not a value")
    ((name, content),) = data.items()
    try:
        if name == "ref":
            return fetch(content)
        if name in SCALARS:
            return SCALARS[name](content)
        if name == "iterator" and len(content) > MAX_ITEMS:  # it could not be sent back
            raise Unsendable("an iterator of too many items")
        return MAKERS[name](decode(_exactly(content, list), fetch, depth + 1))
    except Unsendable:
        raise
    except Exception as error:  # an unhashable key, a number without digits … : all of them mean that this is no value
        raise Unsendable(f"not a value: {type(error).__name__}") from None


def _exactly(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise Unsendable("not a value")
    return value


SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(_exactly(text, str), 16),
    "float": lambda text: {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}[text],
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": lambda text: Decimal(_exactly(text, str)),
    "ellipsis": lambda _: ...,
}
MAKERS: dict[str, Callable[[list], Any]] = {
    "tuple": tuple,
    "dict": dict,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
    "iterator": iter,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "Fraction": lambda parts: Fraction(*(_exactly(part, int) for part in parts)),
}


def reflect(old: Any, new: Any) -> None:
    """Give `old` the content of `new`, keeping the identity of lists, dicts, sets and byte arrays wherever the types agree."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, deque)):
        items = [_merged(a, b) for a, b in zip(old, new, strict=False)] + list(new)[len(old) :]
        old.clear()
        old.extend(items)
    elif isinstance(old, dict):
        items = {key: _merged(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif isinstance(old, tuple):
        for a, b in zip(old, new, strict=False):
            reflect(a, b)


def _merged(old: Any, new: Any) -> Any:
    if type(old) is type(new) and isinstance(old, (list, deque, dict, set, bytearray, tuple)):
        if isinstance(old, tuple) and old != new:
            return new
        reflect(old, new)
        return old
    return new
