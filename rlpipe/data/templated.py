"""Another source's prompts, put to the model in a template."""

from __future__ import annotations

import dataclasses
from functools import cached_property

from rlpipe.data.report import Report
from rlpipe.data.source import PromptSource
from rlpipe.data.templates import Template
from rlpipe.trajectory import Prompt


class Templated(PromptSource):
    """Another source's prompts, put to the model in a template."""

    def __init__(self, source: PromptSource, template: Template):
        self.source, self.template = source, template
        self.task, self.verifier, self.size = source.task, source.verifier, source.size
        self.max_response_chars = source.max_response_chars

    @property
    def identity(self) -> str:
        return f"{self.source.identity} in template {self.template.label}"

    @cached_property
    def alphabet(self) -> str:
        known = self.source.alphabet
        return "".join(sorted({*known, *self.template.characters})) if known else ""

    @property
    def verifiers(self) -> tuple[str, ...]:
        return self.source.verifiers

    @property
    def block_sizes(self) -> tuple[int, ...]:
        return self.source.block_sizes

    @property
    def reports(self) -> tuple[Report, ...]:
        return self.source.reports

    @property
    def held_texts(self) -> set[str]:
        return getattr(self.source, "held_texts", set())

    def leave_out(self, held: set[str]) -> None:
        if hasattr(self.source, "leave_out"):
            self.source.leave_out(held)
            self.size = self.source.size

    def _wrap(self, prompt: Prompt) -> Prompt:
        return dataclasses.replace(prompt, text=self.template.render(prompt), context=())

    def prompt(self, index: int) -> Prompt:
        return self._wrap(self.source.prompt(index))

    def test_prompts(self, count: int) -> list[Prompt]:
        return [self._wrap(prompt) for prompt in self.source.test_prompts(count)]

    def demonstration(self, index: int) -> Prompt:
        return self._wrap(self.source.demonstration(index))
