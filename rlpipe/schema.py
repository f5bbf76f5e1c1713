"""A schema as data: dotted keys with type, default and comment, read from its dataclasses themselves.

`root` is the dataclass of a whole configuration: that of a run, unless another command brings its own.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from rlpipe.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Example: `Key(name="algo.shrink", type="int", default=1, comment="merge every s denoising steps …")`."""

    name: str
    type: str
    default: Any
    comment: str

    def __str__(self) -> str:
        return f"{self.name} ({self.type}{': ' + self.comment if self.comment else ''})"


@functools.cache
def keys(root: type = RunConfig) -> dict[str, Key]:
    """All leaves of the schema, in its order. The comment beside a field, and any under it, is its documentation."""

    def walk(kind: type, values: Any, prefix: str) -> Iterable[Key]:
        lines, kinds = inspect.getsource(kind).splitlines(), get_type_hints(kind)
        for node in ast.parse("\n".join(lines)).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            field = node.target.id
            name, value = f"{prefix}{field}", getattr(values, field)
            if dataclasses.is_dataclass(kinds[field]):
                yield from walk(kinds[field], value, f"{name}.")
            else:
                comment = _comment(lines, node.end_lineno)
                yield Key(name=name, type=ast.unparse(node.annotation), default=value, comment=comment)

    return {key.name: key for key in walk(root, root(), "")}


@functools.cache
def free(root: type = RunConfig) -> tuple[str, ...]:
    """Leaves that are mappings: their own keys are not the schema's."""
    return tuple(key.name for key in keys(root).values() if key.type.startswith("dict"))


def _comment(lines: list[str], number: int) -> str:
    """The comment at the end of 1-based line `number`, and whole-line comments right under it."""
    parts = [lines[number - 1].partition("  # ")[2]]
    for line in lines[number:]:
        if not line.lstrip().startswith("# "):
            break
        parts.append(line.lstrip()[2:])
    return " ".join(part for part in parts if part)


def sections(root: type = RunConfig) -> tuple[str, ...]:
    """Dotted names of everything above a leaf, such as `rollout` and `rollout.decoder`."""
    names = (key.rsplit(".", depth)[0] for key in keys(root) for depth in range(1, key.count(".") + 1))
    return tuple(dict.fromkeys(names))


def flatten(tree: Mapping[str, Any], prefix: str = "", root: type = RunConfig) -> dict[str, Any]:
    """Dotted key → value; lists, empty mappings and the free mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in free(root):
            leaves |= flatten(value, f"{name}.", root)
        else:
            leaves[name] = value
    return leaves


def flat(cfg: Any) -> dict[str, Any]:
    """Dotted key → value of a whole configuration."""
    return flatten(dataclasses.asdict(cfg), root=type(cfg))


def is_known(name: str, root: type = RunConfig) -> bool:
    return name in keys(root) or name in sections(root) or name.startswith(tuple(f"{name}." for name in free(root)))


def suggestion(name: str, root: type = RunConfig) -> str:
    """`; did you mean A or B?` with full dotted keys: first those that end alike, then the similar. May be empty."""
    last = name.rsplit(".", 1)[-1]
    alike = [key for key in keys(root) if key.rsplit(".", 1)[-1] == last]
    near = difflib.get_close_matches(name, [*keys(root), *sections(root)], n=3, cutoff=0.6)
    lasts = {key.rsplit(".", 1)[-1] for key in keys(root)}
    typo = difflib.get_close_matches(last, lasts, n=1, cutoff=0.8) if "." not in name else []
    near += [key for key in keys(root) if key.rsplit(".", 1)[-1] in typo]
    found = list(dict.fromkeys(alike + near))[:4]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def document(root: type = RunConfig) -> str:
    """A line a key: type, default, comment."""
    return "\n".join(f"  {f'{k.name}: {k.type} = {k.default!r}':<56}  {k.comment}".rstrip() for k in keys(root).values())
