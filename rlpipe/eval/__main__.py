"""The entry: `python -m rlpipe.eval run=FOLDER decoders=[…] key=value …`. Exit codes as of `rlpipe.run`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rlpipe.run import main as entry

USAGE = """python -m rlpipe.eval run=outputs/RECIPE/latest decoders=[sdar_static,{preset: sdar_dynamic, threshold: 0.7}] …
python -m rlpipe.eval model.path=FOLDER task=gsm8k max_tokens=512 samples=8 k=[1,8] decoders=[…] …
run=FOLDER: model, task, template, verifier, judge, decoder and guide of a run · recipe=NAME|path.yaml: of a recipe"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate; returns the process's exit code. Every expected failure is one message with its remedy."""
    return entry(list(sys.argv[1:] if arguments is None else arguments), _pausable)


def _pausable(arguments: list[str]) -> int:
    try:
        return evaluate(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command with resume=auto goes on with the responses that are missing", file=sys.stderr)
        return 130


def evaluate(arguments: list[str]) -> int:
    from rlpipe import schema
    from rlpipe.eval.settings import SHORT, EvaluationConfig, check, load

    if not arguments or {"help=true", "--help", "-h"} & set(arguments):
        print(f"{USAGE}\nshort for: {', '.join(f'{k} = {v}' for k, v in SHORT.items())}\nkeys:")
        print(schema.document(EvaluationConfig))
        return 0
    cfg = load(arguments)
    check(cfg)
    from rlpipe.eval import session
    from rlpipe.eval.store import Store, check_folder
    from rlpipe.monitor.console import Console
    from rlpipe.monitor.latest import point_latest

    folder, console = session.results_folder(cfg), Console()
    check_folder(folder, cfg.resume == "auto")
    if cfg.dry_run and session.model_is_elsewhere(cfg):
        console.line(session.describe_unseen(cfg))
        return 0
    known = session.plan(cfg)
    if cfg.dry_run:
        console.line(session.describe(known))
        return 0
    store = Store.open(folder, cfg.resume == "auto", known.identity, known.task.prompts)
    if not cfg.out:
        point_latest(session.home_of(cfg), folder)
    session.run(known, store, console)
    report(known, store, folder, arguments)
    console.line(f"{folder}: results.json, results.md, plot.svg, samples.jsonl")
    return 0


def report(known, store, folder: Path, arguments: Sequence[str]) -> None:
    """Write results.json, results.md and plot.svg, and print the table."""
    from rlpipe.eval import plot, table
    from rlpipe.eval.results import results
    from rlpipe.monitor.files import write_json, write_text

    found = results(known, store, ["python", "-m", "rlpipe.eval", *map(shlex.quote, arguments)])
    write_json(folder / "results.json", found)
    write_text(folder / "results.md", table.markdown(found))
    note = "HEX: the vote, at the speed of all its responses together" if any(row.hex for row in known.rows) else ""
    write_text(folder / "plot.svg", plot.svg(plot.points(found), table.title(found), note))
    table.show(found)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of torch and Ray may linger; everything of ours is closed by now
