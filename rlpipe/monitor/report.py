"""report.html: one self-contained page about a run, made from what lies in its folder.

`python -m rlpipe.monitor.report RUN_DIR` writes it again at any time, also while the run goes on. Whatever a model or a
recipe put in is data to this page: text nodes and escaped attributes only, and a policy that forbids loading anything.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlpipe.errors import CheckpointError, RlpipeError
from rlpipe.monitor.cluster_page import cluster_section
from rlpipe.monitor.curves import Series, chart, number
from rlpipe.monitor.files import jsonable, write_text
from rlpipe.monitor.incidents import fault_line, read_incidents, totals
from rlpipe.monitor.metrics import read_metrics
from rlpipe.monitor.page import SCRIPT, STYLE
from rlpipe.monitor.samples import SampleStore
from rlpipe.monitor.spans import Trace, has_trace, read_trace

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SHOWN_STEPS = 6  # training steps whose samples are shown
SHOWN_TOKENS = 200_000  # of all samples together: about 4 MB of page


def _decoders(suffix: str) -> dict[str, str]:
    """One line for each of the decoders of an evaluation: the one of the rollout, and another."""
    return {"rollout": f"eval/accuracy{suffix}", "other": f"eval/other{suffix}"}


CHARTS = (  # title, {name of the line: key}, logarithmic
    ("Held-out accuracy", _decoders(""), False),
    ("Mean reward", {"reward": "reward/mean"}, False),
    ("Loss, nats a token", {"training": "sft/loss", "held out": "eval/loss"}, False),
    ("Parity: largest |Δ log p|", {"delta": "parity/max_abs_delta"}, True),
    ("Entropy", {"entropy": "algo/entropy"}, False),
    ("Ratios clipped", {"share": "algo/clip_fraction"}, False),
    ("Gradient norm", {"norm": "algo/grad_norm"}, False),
    ("Value model: explained variance of the returns", {"explained": "value/explained_variance"}, False),
    ("Groups with a signal", {"groups": "algo/live_groups"}, False),
    ("Response tokens per second", {"tokens/s": "perf/rollout_tokens_per_s"}, False),
    ("Seconds per step", {"whole": "perf/step_s", "rollout": "perf/rollout_s", "update": "perf/update_s"}, False),
    ("Tokens per denoising step", _decoders("_tokens_per_step"), False),
    ("Response length", _decoders("_response_len"), False),
    ("Ended by EOS", _decoders("_eos_share"), False),
)


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from config.yaml, metrics.jsonl, trajectories/ and, where they are there, summary.json,
    incidents.jsonl and the timeline.

    Returns its path. Raises CheckpointError if one of them is damaged or the page cannot be written.
    """
    config = _read(run_dir / "config.yaml", _yaml)
    summary = _read(run_dir / "summary.json", json.loads) if (run_dir / "summary.json").exists() else {"status": "running"}
    metrics = read_metrics(run_dir / "metrics.jsonl")
    samples = chosen_samples(SampleStore(run_dir / "trajectories"))
    incidents = read_incidents(run_dir / "incidents.jsonl")
    trace = read_trace(run_dir) if has_trace(run_dir) else None
    path = run_dir / "report.html"
    write_text(path, render(config, metrics, summary, samples, incidents, trace))
    return path


def render(
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    incidents: Sequence[Mapping[str, Any]] = (),
    trace: Trace | None = None,
) -> str:
    """The page. config: nested · metrics: lines of metrics.jsonl · samples: [{"step", "rows": [SampleRow as dict]}] ·
    incidents: lines of incidents.jsonl."""
    name = escape(str(config.get("name") or "run"))
    status = escape(str(summary.get("status", "running")))
    limit = config.get("parity", {}).get("max_abs_delta") if isinstance(config.get("parity"), Mapping) else None
    empty = '<p class="lead">No step was logged.</p>'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{name}: {status}</title><style>{STYLE}</style></head><body><main>
<h1>{name}<span class="status {"finished" if status == "finished" else ""}">{status}</span></h1>
<p class="lead">{escape(str(config.get("description") or ""))}</p>
<dl class="tiles">{"".join(_tiles(summary, metrics, incidents))}</dl>
<h2>Curves</h2><div class="curves">{_charts(metrics, limit) or empty}</div>
{cluster_section(metrics, incidents, trace)}
{_replay(samples)}
<h2>Details</h2>
{_details("Every metric", _metric_table(metrics))}
{_details("Configuration", _pairs(flatten(config)))}
{_details("Summary, versions, machine", _pairs(flatten(summary)))}
</main>{_data(samples)}<script>{SCRIPT}</script></body></html>
"""


def chosen_samples(store: SampleStore) -> list[dict[str, Any]]:
    """Samples of SHOWN_STEPS training steps, evenly spread, first and last included, within SHOWN_TOKENS tokens."""
    steps = store.steps()
    if len(steps) > SHOWN_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)]
    budget, shown = SHOWN_TOKENS // max(1, len(steps)), []
    for step in steps:
        rows, left = [], budget
        for row in store.read(step):
            left -= len(row.token_texts)
            if rows and left < 0:
                break
            rows.append(dataclasses.asdict(row))
        shown.append({"step": step, "rows": rows})
    return [entry for entry in shown if entry["rows"]]


def flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys; empty ones stay."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _charts(metrics: Sequence[Mapping[str, Any]], limit: float | None) -> str:
    """The known charts, then each further eval/ key in one of its own."""
    figures = []
    for title, lines, log in CHARTS:
        series = [Series(name, _points(metrics, key)) for name, key in lines.items() if any(key in m for m in metrics)]
        figures.append(chart(title, series, log=log, limit=limit if lines.get("delta") else None))
    known = {key for _, lines, _ in CHARTS for key in lines.values()}
    rest = sorted({key for line in metrics for key in line if key.startswith("eval/")} - known)
    figures += [chart(key, [Series(key, _points(metrics, key))]) for key in rest]
    return "".join(figures)


def _points(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float | None]]:
    return [(line["step"], line[key]) for line in metrics if key in line]


def _tiles(
    summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], incidents: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """The headline: before, after, and what it took. A run without a summary is told from its metrics."""

    def ends(key: str) -> tuple[float | None, float | None]:
        values = [value for _, value in _points(metrics, key) if value is not None]
        return (values[0], values[-1]) if values else (None, None)

    solved = (summary.get("eval_start"), summary.get("eval_final"))
    for label, (before, after) in (
        ("Held-out accuracy", solved if None not in solved else ends("eval/accuracy")),
        ("Mean reward", ends("reward/mean")),
        ("Held-out loss", ends("eval/loss")),
    ):
        if before is not None:
            yield _tile(label, f"{before:.3f} → {after:.3f}", f"{after - before:+.3f}")
    step = summary.get("steps", metrics[-1]["step"] if metrics else 0)
    seconds = summary.get("seconds")
    yield _tile("Steps", str(step), f"{seconds:.0f} s of training" if seconds else "")
    if summary.get("tokens_per_s"):
        yield _tile("Response tokens per second", f"{summary['tokens_per_s']:.0f}", "over the whole step")
    deltas = [value for _, value in _points(metrics, "parity/max_abs_delta") if value is not None]
    if deltas:
        yield _tile("Parity, worst step", number(max(deltas)), "largest |Δ log p|, rollout to learner")
    if incidents:
        yield _tile("Incidents", str(len(incidents)), fault_line(totals(incidents)))
    if summary.get("warnings"):
        yield _tile("Warnings", str(summary["warnings"]), "see log.txt")


def _tile(label: str, value: str, note: str) -> str:
    return f'<div class="tile"><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>'


def _replay(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    return """<h2>Denoising, replayed</h2><section class="replay">
<div class="bar"><select class="step" aria-label="training step"></select>
<select class="row" aria-label="sample"></select></div>
<p class="facts"></p>
<p class="label">Prompt</p><pre class="prompt"></pre>
<p class="label">Response, coloured by the denoising step of each token: early<span class="ramp"></span>late. A dot is
still masked, a frame was committed just now, faint tokens come after the end and do not count.</p>
<pre class="canvas"></pre>
<div class="bar"><button class="play" type="button">Play</button>
<input class="slider" type="range" min="0" max="1" value="1" aria-label="denoising step">
<span class="clock"></span></div>
<noscript><p class="facts">The replay needs scripts; the samples themselves are in trajectories/.</p></noscript>
</section>"""


def _data(samples: Sequence[Mapping[str, Any]]) -> str:
    """The samples as JSON that cannot end its own element: every < > & is written as an escape."""
    text = json.dumps(jsonable(list(samples)), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="samples">{text}</script>'


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _pairs(pairs: Iterator[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in pairs)
    return f"<table>{rows}</table>"


def _metric_table(metrics: Sequence[Mapping[str, Any]]) -> str:
    """First, last, least and greatest value of every key."""
    rows = []
    for key in sorted({key for line in metrics for key in line} - {"step"}):
        values = [value for _, value in _points(metrics, key) if value is not None]
        cells = (values[0], values[-1], min(values), max(values)) if values else (None,) * 4
        rows.append(f"<tr><td>{escape(key)}</td>" + "".join(f'<td class="n">{number(v)}</td>' for v in cells) + "</tr>")
    heads = "".join(f'<th class="n">{head}</th>' for head in ("first", "last", "least", "greatest"))
    return f"<table><tr><th>metric</th>{heads}</tr>{''.join(rows)}</table>"


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _read(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Give the folder of a run that has started") from error
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path} holds no settings, but {type(value).__name__}; give the folder of a run")
    return value


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m rlpipe.monitor.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(arguments[0])))
    except RlpipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
