"""Several sources as one, in fixed shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count as integers

from rlpipe.data.report import Report
from rlpipe.data.source import PromptSource
from rlpipe.data.templates import Template, resolve
from rlpipe.trajectory import Prompt

CHUNK = 1024  # picks between two remembered counts


@dataclass(frozen=True)
class Templates:
    """The templates of all parts, as one is asked about."""

    of: dict[str, Template]

    @property
    def label(self) -> str:
        names = {name: template.label for name, template in self.of.items()}
        return next(iter(names.values())) if len(set(names.values())) == 1 else str(names)

    def text(self) -> str:
        return "\n".join(f"{name}: {line}" for name, template in self.of.items() for line in template.text().splitlines())


@dataclass(frozen=True)
class Component:
    """name: unlike the others', it begins the uids · weight: above 0, in any unit · verifier: empty for the source's."""

    name: str
    source: PromptSource
    weight: float
    verifier: str = ""

    @property
    def judge(self) -> str:
        return self.verifier or self.source.verifier


class Schedule:
    """Which component the index-th prompt is of, and how many of that component came before it.

    It is always the component that lags its share most (the first of equals), so every stretch of prompts holds the shares as
    nearly as whole prompts can. No draw is involved.
    """

    def __init__(self, weights: Sequence[float]):
        total = sum(weights)
        self.shares = [weight / total for weight in weights]
        self._picks = bytearray() if len(weights) < 256 else []
        self._counts = [[0] * len(weights)]  # at the start of each chunk

    def __getitem__(self, index: int) -> tuple[int, int]:
        while index >= len(self._picks):
            self._extend()
        chunk = index // CHUNK
        component = self._picks[index]
        earlier = sum(self._picks[at] == component for at in range(chunk * CHUNK, index))
        return component, self._counts[chunk][component] + earlier

    def _extend(self) -> None:
        counts, done = list(self._counts[-1]), len(self._picks)
        for index in range(done, done + CHUNK):
            lags = [share * (index + 1) - count for share, count in zip(self.shares, counts, strict=True)]
            pick = lags.index(max(lags))
            counts[pick] += 1
            self._picks.append(pick)
        self._counts.append(counts)


class Mixture(PromptSource):
    """Prompts of all components, interleaved by weight; each goes through its own shuffled passes.

    A prompt's uid begins with its component's name, and it says its verifier unless that is the first component's. Training
    records that any component holds out are left out of all; procedural tasks hold out by content, so they agree anyway.
    """

    task = "mixture"

    def __init__(self, components: Sequence[Component], verifier: str = ""):
        self.components = list(components)
        self.schedule = Schedule([component.weight for component in components])
        self.verifier = verifier or components[0].judge
        held = set().union(*(getattr(component.source, "held_texts", set()) for component in components))
        for component in components:
            if hasattr(component.source, "leave_out"):
                component.source.leave_out(held)
        lengths = [component.source.max_response_chars for component in components]
        self.max_response_chars = None if None in lengths else max(lengths)

    @property
    def template(self) -> Templates:
        return Templates({part.name: getattr(part.source, "template", resolve("{prompt}")) for part in self.components})

    @property
    def identity(self) -> str:
        parts = ", ".join(f"{c.name}: {c.weight:g} × {c.source.identity}" for c in self.components)
        return f"mixture({parts})"

    @cached_property
    def alphabet(self) -> str:
        known = [component.source.alphabet for component in self.components]
        return "".join(sorted(set().union(*known))) if all(known) else ""

    @property
    def verifiers(self) -> tuple[str, ...]:
        found = [(c.verifier,) if c.verifier else c.source.verifiers for c in self.components]
        return tuple(dict.fromkeys([self.verifier, *(name for names in found for name in names)]))

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return tuple(sorted({size for component in self.components for size in component.source.block_sizes}))

    @property
    def reports(self) -> tuple[Report, ...]:
        return tuple(report for component in self.components for report in component.source.reports)

    def _label(self, component: Component, prompt: Prompt) -> Prompt:
        judge = component.verifier or prompt.verifier or component.source.verifier
        named = {"uid": f"{component.name}/{prompt.uid}", "record": prompt.record or prompt.uid}
        return dataclasses.replace(prompt, verifier="" if judge == self.verifier else judge, **named)

    def prompt(self, index: int) -> Prompt:
        which, inner = self.schedule[index]
        return self._label(self.components[which], self.components[which].source.prompt(inner))

    def demonstration(self, index: int) -> Prompt:
        which, inner = self.schedule[index]
        return self._label(self.components[which], self.components[which].source.demonstration(inner))

    def test_prompts(self, count: int) -> list[Prompt]:
        """In the shares of the mixture as far as a component has enough; the others fill up with what they have."""
        left = [component.source.test_prompts(count)[::-1] for component in self.components]
        found: list[Prompt] = []
        for index in integers():
            if len(found) >= count or not any(left):
                return found
            which = self.schedule[index][0]
            if left[which]:
                found.append(self._label(self.components[which], left[which].pop()))
        return found
