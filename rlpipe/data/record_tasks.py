"""Sources of records from their settings: what is read, in which template, what is left out, in which order."""

from __future__ import annotations

import json
import logging
import zlib

from rlpipe.config import DataConfig
from rlpipe.data import report as reasons
from rlpipe.data.benchmarks import BENCHMARKS
from rlpipe.data.files import Where
from rlpipe.data.model_files import ModelFiles
from rlpipe.data.pass_rates import Difficulty
from rlpipe.data.records import Record, RecordSource, read
from rlpipe.data.report import Report
from rlpipe.data.source import PromptSource, held_out
from rlpipe.data.templated import Templated
from rlpipe.data.templates import Template, or_without_chat, resolve
from rlpipe.errors import ConfigError, DataError

log = logging.getLogger("rlpipe")

FILES = ("records", "jsonl")  # two names for one thing: the user's own files, of any kind


def template_of(cfg: DataConfig, files: ModelFiles) -> Template:
    """The recipe's template, or the task's own."""
    if cfg.template or cfg.task not in BENCHMARKS:
        return resolve(cfg.template or "{prompt}", files)
    return or_without_chat(BENCHMARKS[cfg.task].template, files)


def places(cfg: DataConfig) -> tuple[str, str]:
    """What data.train and data.test come to: the recipe's, or else the task's own."""
    bench = BENCHMARKS.get(cfg.task)
    return cfg.train or (bench.train if bench else ""), cfg.test or (bench.test if bench else "")


def record_source(cfg: DataConfig, seed: int, files: ModelFiles, training: bool = True) -> PromptSource:
    """training: False reads held-out records alone, unless they are a part of the training ones."""
    if cfg.bad_records not in ("refuse", "skip"):
        raise ConfigError(f"data.bad_records={cfg.bad_records} is neither refuse nor skip")
    template, difficulty = template_of(cfg, files), Difficulty.of(cfg.pass_rates, cfg.difficulty, cfg.curriculum)
    bench = BENCHMARKS.get(cfg.task)
    train_from, test_from = places(cfg)

    def take(place: str, key: str) -> tuple[list[Record], Report]:
        settings = {"skip_bad": cfg.bad_records == "skip", "prefer": bench.shape if bench else ""}
        found, report = read(Where.parse(place, key), cfg.task, cfg.format, cfg.options, **settings)
        return _that_fit(found, report, template, cfg, files), report

    train, reports = [], []
    if (training or test_from == "held_out") and (train_from or bench is None):
        train, report = take(train_from, "data.train")
        reports.append(report)
    if test_from == "held_out":
        test = [record for record in train if held_out(record.content)]
        train = [record for record in train if not held_out(record.content)]
        if not test or not train:
            raise DataError(f"data.test=held_out: {train_from} has too few different prompts to hold an eighth of them out")
        for record in test:
            reports[0].drop(reasons.HELD_OUT, record.place, f"{record.place}: kept for testing")
    else:
        test, report = take(test_from, "data.test")
        reports.append(report)
    train = _by_difficulty(train, difficulty, reports[0]) if training else []
    order = difficulty.order if difficulty.curriculum != "none" else None
    named = f"{difficulty.curriculum} by rates {_checksum(train, difficulty):08x}" if order else ""
    source = RecordSource(cfg.task, seed, train, test, reports=reports, order=order, ordered_by=named)
    return source if template.is_plain else Templated(source, template)


def _that_fit(found: list[Record], report: Report, template: Template, cfg: DataConfig, files: ModelFiles) -> list[Record]:
    """Records that the template can put to the model within the limits; the others are counted. DataError if none is left."""
    kept = []
    for record in found:
        if not (cfg.max_prompt_chars or cfg.max_prompt_tokens or record.context):
            kept.append(record)
            continue
        try:
            text = template.render(record.prompt(record.place, record.verifier))
        except DataError as error:
            if cfg.bad_records == "refuse":
                raise
            report.drop(reasons.BAD, record.place, str(error))
            continue
        reason = _too_long(text, cfg, files)
        if reason:
            report.drop(reasons.TOO_LONG, record.place, f"{record.place}: {reason}")
        else:
            kept.append(record)
    if not kept:
        raise DataError(f"{report.origin}: all {len(found)} records are left out, the last because: {report.listed[-1][2]}")
    return kept


def _too_long(text: str, cfg: DataConfig, files: ModelFiles) -> str:
    if cfg.max_prompt_chars and len(text) > cfg.max_prompt_chars:
        return f"prompt of {len(text)} characters, data.max_prompt_chars={cfg.max_prompt_chars}"
    if cfg.max_prompt_tokens and (count := files.count_tokens(text)) > cfg.max_prompt_tokens:
        return f"prompt of {count} tokens, data.max_prompt_tokens={cfg.max_prompt_tokens}"
    return ""


def _checksum(train: list[Record], difficulty: Difficulty) -> int:
    """Of the records' pass rates: a file of another content gives another order, whatever its name."""
    return zlib.crc32(json.dumps([difficulty.rates.get(record.key) for record in train]).encode())


def _by_difficulty(train: list[Record], difficulty: Difficulty, report: Report) -> list[Record]:
    kept = []
    for record in train:
        if reason := difficulty.refuses(record):
            report.drop(reasons.DIFFICULTY, record.place, f"{record.place}: {reason}")
        else:
            kept.append(record)
    known = sum(record.key in difficulty.rates for record in train)
    if difficulty.rates and not known:
        raise DataError(f"data.pass_rates: none of its records is in {report.origin}; it is of other data")
    if train and not kept:
        raise DataError(f"data.difficulty leaves none of the {len(train)} records of {report.origin}; widen it")
    if difficulty.rates:
        log.info("%s: pass rates of %d of %d records; the others stay", report.origin, known, len(train))
    return kept
