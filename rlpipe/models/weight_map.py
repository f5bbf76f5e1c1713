"""Names and layouts of weights: what a checkpoint calls and stores its tensors as, against the stock class that computes it.

A map is a list of small rules; a name that no rule knows is the same on both sides. Every rule works in both directions and
only renames, cuts and joins, so that a tensor that goes there and back is identical to the bit, in any dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol

import torch

Tensors = list[torch.Tensor]
PLACEHOLDERS = {"layer": r"(?:0|[1-9]\d*)", "expert": r"(?:0|[1-9]\d*)", "rest": r".+"}  # any other: a part without dots


@dataclass(frozen=True)
class Origin:
    """What one tensor is made of: `make` takes the tensors of `names`, in that order."""

    names: tuple[str, ...]
    make: Callable[[Tensors], torch.Tensor]

    @classmethod
    def same(cls, name: str) -> Origin:
        """The tensor of that name itself, not a copy."""
        return cls((name,), _only)


class Rule(Protocol):
    def stock(self, name: str) -> Origin | None:
        """What the stock parameter or buffer is made of; None if the rule does not know it."""
        ...

    def original(self, name: str) -> Origin | None:
        """What the tensor of the checkpoint is made of; None if the rule does not know it."""
        ...


@dataclass(frozen=True)
class WeightMap:
    """Between stock names (parameters and persistent buffers of the class) and original ones (of the checkpoint's files).

    The first rule that knows a name decides. Without rules it is the identity.
    """

    rules: tuple[Rule, ...] = ()

    def stock(self, stock_name: str) -> Origin:
        """Which original tensors a stock one is made of, and how."""
        return _first((rule.stock(stock_name) for rule in self.rules), stock_name)

    def original(self, original_name: str) -> Origin:
        """Which stock tensors an original one is made of, and how."""
        return _first((rule.original(original_name) for rule in self.rules), original_name)

    def original_names(self, stock_names: Iterable[str]) -> list[str]:
        """The names that a checkpoint of these stock tensors has, in their order, each once."""
        return list(dict.fromkeys(name for stock in stock_names for name in self.stock(stock).names))


@dataclass(frozen=True)
class Rename:
    """One tensor under two names. The templates share placeholders: `{layer}` and `{expert}` stand for a number, `{rest}` for
    anything, any other for a part of a name without dots."""

    stock_name: str
    original_name: str

    def stock(self, name: str) -> Origin | None:
        return _renamed(name, self.stock_name, self.original_name)

    def original(self, name: str) -> Origin | None:
        return _renamed(name, self.original_name, self.stock_name)


@dataclass(frozen=True)
class Experts:
    """Experts that the stock class holds in one parameter [experts, outputs, inputs] and the checkpoint one by one.

    original_names: with `{expert}`; several are stacked along the outputs, in that order (gate above up).
    """

    stock_name: str
    original_names: tuple[str, ...]
    count: int

    def stock(self, name: str) -> Origin | None:
        where = _match(self.stock_name, name)
        if where is None:
            return None
        names = [part.format(**where, expert=e) for e in range(self.count) for part in self.original_names]
        return Origin(tuple(names), self._stack)

    def original(self, name: str) -> Origin | None:
        for index, part in enumerate(self.original_names):
            where = _match(part, name)
            if where is not None:
                expert = int(where.pop("expert"))
                if expert >= self.count:
                    return None
                return Origin((self.stock_name.format(**where),), partial(self._cut, expert, index))
        return None

    def _stack(self, tensors: Tensors) -> torch.Tensor:
        """Matrices [outputs / parts, inputs], expert by expert, → [experts, outputs, inputs]; one copy."""
        return torch.cat(tensors).view(self.count, -1, tensors[0].shape[1])

    def _cut(self, expert: int, index: int, tensors: Tensors) -> torch.Tensor:
        return tensors[0][expert].chunk(len(self.original_names))[index].clone()


@dataclass(frozen=True)
class Fused:
    """Projections that the checkpoint holds in one tensor, one above the other, and the stock class one by one.

    rows: outputs of each, in the order of `stock_names`. Weights and biases alike.
    """

    stock_names: tuple[str, ...]
    original_name: str
    rows: tuple[int, ...]

    def stock(self, name: str) -> Origin | None:
        for index, part in enumerate(self.stock_names):
            where = _match(part, name)
            if where is not None:
                return Origin((self.original_name.format(**where),), partial(self._cut, index))
        return None

    def original(self, name: str) -> Origin | None:
        where = _match(self.original_name, name)
        if where is None:
            return None
        return Origin(tuple(part.format(**where) for part in self.stock_names), torch.cat)

    def _cut(self, index: int, tensors: Tensors) -> torch.Tensor:
        return tensors[0].split(self.rows)[index].clone()


@dataclass(frozen=True)
class Tied:
    """An LM head that is the embedding. Checkpoints have one tensor or both; a head that is there is the embedding again."""

    original_head: str
    original_embedding: str
    stock_head: str = "lm_head.weight"
    stock_embedding: str = "model.embed_tokens.weight"

    def stock(self, name: str) -> Origin | None:
        return Origin.same(self.original_embedding) if name in (self.stock_head, self.stock_embedding) else None

    def original(self, name: str) -> Origin | None:
        return Origin.same(self.stock_embedding) if name in (self.original_head, self.original_embedding) else None


def _first(found: Iterable[Origin | None], name: str) -> Origin:
    return next((origin for origin in found if origin is not None), Origin.same(name))


def _only(tensors: Tensors) -> torch.Tensor:
    return tensors[0]


def _renamed(name: str, here: str, there: str) -> Origin | None:
    where = _match(here, name)
    return None if where is None else Origin.same(there.format(**where))


def _match(template: str, name: str) -> dict[str, str] | None:
    found = _pattern(template).fullmatch(name)
    return None if found is None else found.groupdict()


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    fixed, names = parts[0::2], parts[1::2]
    groups = [rf"(?P<{name}>{PLACEHOLDERS.get(name, '[^.]+')})" for name in names]
    return re.compile("".join(a + b for a, b in zip(map(re.escape, fixed), [*groups, ""], strict=True)))
