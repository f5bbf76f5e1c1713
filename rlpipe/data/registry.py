"""Prompt sources by name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from rlpipe.config import DataConfig
from rlpipe.data.countdown import Countdown
from rlpipe.data.jsonl import JsonlSource
from rlpipe.data.source import PromptSource
from rlpipe.data.sudoku import Sudoku
from rlpipe.errors import ConfigError
from rlpipe.trajectory import Prompt

PROCEDURAL: dict[str, Callable[..., PromptSource]] = {"sudoku": Sudoku, "countdown": Countdown}


def build_source(cfg: DataConfig, seed: int) -> PromptSource:
    """The recipe's prompt source. Raises ConfigError for an unknown task or option, DataError for unusable files."""
    if "{prompt}" not in cfg.template:
        raise ConfigError(f"data.template={cfg.template!r} has no {{prompt}} in it, so the model would not see the task")
    if cfg.task.startswith("reasoning_gym:"):
        from rlpipe.data.reasoning_gym import ReasoningGym

        source: PromptSource = ReasoningGym(cfg.task.partition(":")[2], seed, **cfg.options)
    elif cfg.task == "jsonl":
        if cfg.options:
            raise ConfigError(f"data.options.{next(iter(cfg.options))}: task jsonl has no options; leave data.options empty")
        source = JsonlSource(cfg.train, cfg.test, seed)
    elif cfg.task in PROCEDURAL:
        maker = PROCEDURAL[cfg.task]
        _check_options(cfg.task, maker, cfg.options)
        source = maker(seed, **cfg.options)
    else:
        known = [*PROCEDURAL, "jsonl", "reasoning_gym:NAME"]
        near = difflib.get_close_matches(cfg.task, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"data.task={cfg.task} is not one of {', '.join(known)}; did you mean {near}?")
    return source if cfg.template == "{prompt}" else Templated(source, cfg.template)


def _check_options(task: str, maker: Callable[..., PromptSource], options: dict[str, Any]) -> None:
    known = [name for name, p in inspect.signature(maker).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"data.options.{name}: task {task} has no such option; did you mean {near}? ({', '.join(known)})")


class Templated(PromptSource):
    """Another source's prompts, put to the model in a template."""

    def __init__(self, source: PromptSource, template: str):
        self.source, self.template = source, template
        self.task, self.verifier, self.size = source.task, source.verifier, source.size
        self.max_response_chars = source.max_response_chars
        self.identity = f"{source.identity} in template {template!r}"
        if source.alphabet:
            self.alphabet = "".join(sorted({*source.alphabet, *template.replace("{prompt}", "")}))

    def _wrap(self, prompt: Prompt) -> Prompt:
        return dataclasses.replace(prompt, text=self.template.replace("{prompt}", prompt.text))

    def prompt(self, index: int) -> Prompt:
        return self._wrap(self.source.prompt(index))

    def test_prompts(self, count: int) -> list[Prompt]:
        return [self._wrap(prompt) for prompt in self.source.test_prompts(count)]

    def demonstration(self, index: int) -> Prompt:
        return self._wrap(self.source.demonstration(index))
