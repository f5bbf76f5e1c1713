"""What a run would read and show to the model, in words: for a dry run."""

from __future__ import annotations

import dataclasses
import importlib.util

from rlpipe.config import DataConfig, RunConfig
from rlpipe.data.benchmarks import BENCHMARKS
from rlpipe.data.files import Where, is_here
from rlpipe.data.mixture import Mixture
from rlpipe.data.model_files import ModelFiles
from rlpipe.data.record_tasks import FILES, places, template_of
from rlpipe.data.registry import build_source
from rlpipe.data.source import PromptSource
from rlpipe.data.templates import resolve
from rlpipe.errors import DataError
from rlpipe.model_shapes import is_hub_id
from rlpipe.trajectory import Prompt

SHOWN = 2000  # characters of an example


def missing_data(cfg: DataConfig) -> list[str]:
    """What has to be downloaded or put somewhere first, a line each; nothing is downloaded to find out."""
    missing: list[str] = []
    for part in _parts(cfg):
        if part.task not in BENCHMARKS and part.task not in FILES:
            continue
        for place, key in zip(places(part), ("data.train", "data.test"), strict=True):
            if not place or place == "held_out":
                continue
            where = Where.parse(place, key)
            module = where.name.removeprefix("package:").partition("/")[0]
            if where.name.startswith("package:"):
                if importlib.util.find_spec(module) is None:
                    missing.append(f"the data: the package {module.replace('_', '-')} for {where.name} ({key})")
            elif where.is_hub_id and not is_here(where):
                missing.append(f"the data: {place} is not in the cache of the library datasets and will be downloaded ({key})")
            elif not is_here(where):
                missing.append(f"the data: no file {where.name} ({key})")
    return list(dict.fromkeys(missing))


def _parts(cfg: DataConfig) -> list[DataConfig]:
    own = {field.name for field in dataclasses.fields(DataConfig)}
    blank = {"mixture": [], "train": "", "test": "", "options": {}}
    entries = [{key: value for key, value in entry.items() if key in own} for entry in cfg.mixture]
    return [dataclasses.replace(cfg, **(blank | entry)) for entry in entries] or [cfg]


def describe_source(cfg: RunConfig) -> str:
    """Template with name, version and full text, one prompt as the model would read it, counts of what is read and left out.

    Nothing is downloaded: for data that is not here it says so instead. Raises ConfigError for settings that are wrong.
    """
    data, files = cfg.data, ModelFiles(cfg.model.path, cfg.model.revision, fetch=False)
    lines = [f"data: {f'a mixture of {len(data.mixture)} parts' if data.mixture else _named(data.task)}"]
    unseen = is_hub_id(files.path) and files.folder is None
    for part in _parts(data):
        template = resolve(_setting(part), files) if unseen else template_of(part, files)
        lines.append(f"  template of {part.task}: {template.label}")
        lines += [f"    {line}" for line in template.text().splitlines()]
    missing = missing_data(data)
    if unseen:
        missing.append(f"the model: the chat template and the tokenizer of {files.path}")
    if missing:
        return "\n".join([*lines, "  not read, because not all of it is here:", *(f"    {line}" for line in missing)])
    try:
        source = build_source(data, cfg.seed, cfg.model.path, cfg.model.revision)
    except DataError as error:
        return "\n".join([*lines, f"  cannot be read: {error}"])
    if isinstance(source, Mixture):
        shares = zip(source.components, source.schedule.shares, strict=True)
        lines += [f"  {share:.1%} {part.name}, judged by {part.judge}" for part, share in shares]
    lines += [f"  {line}" for report in source.reports for line in report.lines()]
    lines.append(f"  judged by: {cfg.verifier.name or ', '.join(source.verifiers)}")
    if source.block_sizes:
        lines.append(f"  block sizes that records ask for: {', '.join(map(str, source.block_sizes))}")
    for kind, prompt in _examples(source):
        lines.append(f"  a {kind} prompt as the model reads it ({prompt.uid}, {len(prompt.text)} characters):")
        lines += [f"    | {line}" for line in prompt.text[:SHOWN].split("\n")]
    return "\n".join(lines)


def _setting(part: DataConfig) -> str:
    return part.template or (BENCHMARKS[part.task].template if part.task in BENCHMARKS else "{prompt}")


def _named(task: str) -> str:
    about = BENCHMARKS[task].about if task in BENCHMARKS else ""
    return f"{task}: {about}" if about else task


def _examples(source: PromptSource) -> list[tuple[str, Prompt]]:
    """The first training prompt, or the first held-out one of a task for evaluation."""
    try:
        return [("training", source.prompt(0))]
    except DataError:
        return [("held-out", prompt) for prompt in source.test_prompts(1)]
