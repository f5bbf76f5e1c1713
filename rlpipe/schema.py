"""The schema of a recipe as data: dotted keys with type, default and comment, read from `rlpipe.config` itself."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlpipe import config
from rlpipe.config import RunConfig

FREE = (
    "algo.options",
    "data.options",
    "eval.decoder",
    "rollout.decoder.options",
)  # mappings whose own keys are not the schema's


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
def keys() -> dict[str, Key]:
    """All leaves of the schema, in its order. The comment beside a field, and any under it, is its documentation."""
    lines = inspect.getsource(config).splitlines()
    classes = {node.name: node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.ClassDef)}
    defaults = flat(RunConfig())

    def walk(name: str, prefix: str) -> Iterable[Key]:
        for node in classes[name].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            key, kind = f"{prefix}{node.target.id}", ast.unparse(node.annotation)
            if kind in classes:
                yield from walk(kind, f"{key}.")
            else:
                yield Key(name=key, type=kind, default=defaults[key], comment=_comment(lines, node.end_lineno))

    return {key.name: key for key in walk("RunConfig", "")}


def _comment(lines: list[str], number: int) -> str:
    """The comment at the end of 1-based line `number`, and whole-line comments right under it."""
    parts = [lines[number - 1].partition("  # ")[2]]
    for line in lines[number:]:
        if not line.lstrip().startswith("# "):
            break
        parts.append(line.lstrip()[2:])
    return " ".join(part for part in parts if part)


def sections() -> tuple[str, ...]:
    """Dotted names of everything above a leaf, such as `rollout` and `rollout.decoder`."""
    names = (key.rsplit(".", depth)[0] for key in keys() for depth in range(1, key.count(".") + 1))
    return tuple(dict.fromkeys(names))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value; lists, empty mappings and the free mappings are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in FREE:
            leaves |= flatten(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves


def flat(cfg: RunConfig) -> dict[str, Any]:
    """Dotted key → value of a whole configuration."""
    return flatten(dataclasses.asdict(cfg))


def is_known(name: str) -> bool:
    return name in keys() or name in sections() or name.startswith(tuple(f"{free}." for free in FREE))


def suggestion(name: str) -> str:
    """`; did you mean A or B?` with full dotted keys: first those that end alike, then the similar. May be empty."""
    last = name.rsplit(".", 1)[-1]
    alike = [key for key in keys() if key.rsplit(".", 1)[-1] == last]
    near = difflib.get_close_matches(name, [*keys(), *sections()], n=3, cutoff=0.6)
    lasts = {key.rsplit(".", 1)[-1] for key in keys()}
    typo = difflib.get_close_matches(last, lasts, n=1, cutoff=0.8) if "." not in name else []
    near += [key for key in keys() if key.rsplit(".", 1)[-1] in typo]
    found = list(dict.fromkeys(alike + near))[:4]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def document() -> str:
    """A line a key: type, default, comment."""
    return "\n".join(f"  {f'{k.name}: {k.type} = {k.default!r}':<56}  {k.comment}".rstrip() for k in keys().values())
