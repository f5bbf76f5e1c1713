"""report.html: one page without outside resources: before and after, curves, samples with their denoising order, configuration."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from rlpipe.monitor.files import write_atomic

CHARTS = (  # title, metrics drawn together
    ("Held-out accuracy", ("eval/accuracy", "eval/other")),
    ("Reward", ("reward/mean",)),
    ("Live groups", ("algo/live_groups",)),
    ("Entropy (nats a token)", ("algo/entropy",)),
    ("Clipped share", ("algo/clip_fraction",)),
    ("Gradient norm", ("algo/grad_norm",)),
    ("Parity: largest gap (nats)", ("parity/max_abs_delta",)),
    ("Response length (tokens)", ("rollout/response_len",)),
    ("Rollout tokens/s", ("perf/rollout_tokens_per_s",)),
    ("Seconds a step", ("perf/step_s", "perf/rollout_s", "perf/update_s")),
)
COLOURS = ("var(--a)", "var(--b)", "var(--c)")
WIDTH, HEIGHT, PAD = 340, 150, 34
SHOWN_SAMPLES = 24

STYLE = """
:root{--bg:#fbfaf7;--fg:#1d1f24;--soft:#6b7078;--line:#dedbd2;--card:#fff;--a:#2f6f5e;--b:#b4552d;--c:#5a5fa8}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e7e5df;--soft:#9a9ea6;--line:#31353c;--card:#1c1f24;--a:#6fbfa8;--b:#e0946c;--c:#9ba0ea}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px}h1{font-size:26px;margin:0}h2{font-size:17px;margin:36px 0 12px}
.soft{color:var(--soft)}.head{font-size:40px;font-weight:600;letter-spacing:-.02em;margin:18px 0 4px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow:hidden}
.card h3{font-size:13px;font-weight:600;margin:0 0 6px}svg{width:100%;height:auto;display:block}
svg text{font:10px system-ui;fill:var(--soft)}.legend span{font-size:11px;margin-right:10px}
pre,.tokens{font:13px/1.7 ui-monospace,monospace;white-space:pre-wrap;word-break:break-word;margin:6px 0}
.tokens b{font-weight:400;border-radius:3px;padding:1px 1px}.tokens b.hidden{color:transparent!important;background:var(--line)!important}
input[type=range]{width:100%}table{border-collapse:collapse;font-size:13px}td{padding:2px 14px 2px 0;border-bottom:1px solid var(--line)}
"""

SCRIPT = """
for(const s of document.querySelectorAll('.sample')){
  const r=s.querySelector('input'),o=s.querySelector('output');if(!r)continue;
  const show=()=>{const n=+r.value;o.textContent='step '+n+' of '+r.max;
    for(const b of s.querySelectorAll('b'))b.classList.toggle('hidden',!+b.dataset.s||+b.dataset.s>n)};
  r.addEventListener('input',show);show()}
"""


def write_report(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write run_dir/report.html from what the run left. All text of models and tasks is escaped: it may be hostile."""
    lines = _read_metrics(run_dir / "metrics.jsonl")
    charts = "".join(_chart(title, keys, lines) for title, keys in CHARTS)
    samples = "".join(_sample(step, row) for step, row in _last_samples(run_dir))
    config = html.escape((run_dir / "config.yaml").read_text(encoding="utf8"))
    start, final = (summary.get(key) for key in ("eval_start", "eval_final"))
    head = f"{start:.3f} → {final:.3f}" if start is not None and final is not None else "not finished"
    facts = "".join(f"<tr><td class=soft>{html.escape(k)}</td><td>{html.escape(_brief(v))}</td></tr>" for k, v in summary.items())
    name = html.escape(f"{summary.get('recipe') or run_dir.parent.name} / {run_dir.name}")
    write_atomic(
        run_dir / "report.html",
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width"><title>{name}</title>'
        f"<style>{STYLE}</style><main><h1>{name}</h1><div class=head>{head}</div>"
        f"<div class=soft>held-out accuracy, before and after {summary.get('steps', 0)} steps</div>"
        f"<h2>Curves</h2><div class=grid>{charts}</div>"
        f"<h2>Samples</h2><p class=soft>Drag a slider to replay the denoising; colour runs from the first to the last step.</p>"
        f"<div class=grid>{samples or '<p class=soft>none kept</p>'}</div>"
        f"<h2>Summary</h2><table>{facts}</table><h2>Configuration</h2><pre>{config}</pre></main><script>{SCRIPT}</script></html>",
    )


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict) else str(value)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def _chart(title: str, keys: tuple[str, ...], lines: list[dict[str, Any]]) -> str:
    series = [(key, [(line["step"], line[key]) for line in lines if line.get(key) is not None]) for key in keys]
    series = [(key, points) for key, points in series if points]
    if not series:
        return ""
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    low, high = min([0.0, *ys]), max(ys)
    span_x, span_y = max(xs) - min(xs) or 1, (high - low) or 1.0

    def place(x: float, y: float) -> str:
        return f"{PAD + (x - min(xs)) / span_x * (WIDTH - PAD - 8):.1f},{HEIGHT - 18 - (y - low) / span_y * (HEIGHT - 30):.1f}"

    drawn, legend = "", ""
    for colour, (key, points) in zip(COLOURS, series, strict=False):
        path = " ".join(place(x, y) for x, y in points)
        drawn += f'<polyline fill=none stroke="{colour}" stroke-width=1.8 points="{path}"/>'
        legend += f'<span style="color:{colour}">{html.escape(key)} {points[-1][1]:.3g}</span>'
    axis = f'<line x1={PAD} y1={HEIGHT - 18} x2={WIDTH - 8} y2={HEIGHT - 18} stroke="var(--line)"/>'
    labels = (
        f'<text x={PAD - 4} y=16 text-anchor=end>{high:.3g}</text><text x={PAD - 4} y={HEIGHT - 16} text-anchor=end>{low:.3g}</text>'
        f"<text x={PAD} y={HEIGHT - 4}>{min(xs)}</text><text x={WIDTH - 8} y={HEIGHT - 4} text-anchor=end>{max(xs)}</text>"
    )
    return (
        f"<div class=card><h3>{html.escape(title)}</h3><svg viewBox='0 0 {WIDTH} {HEIGHT}'>{axis}{drawn}{labels}</svg>"
        f"<div class=legend>{legend}</div></div>"
    )


def _last_samples(run_dir: Path) -> list[tuple[int, dict[str, Any]]]:
    """The newest samples first."""
    found: list[tuple[int, dict[str, Any]]] = []
    for path in sorted((run_dir / "trajectories").glob("step_*.json"), reverse=True):
        rows = json.loads(path.read_text(encoding="utf8"))
        found += [(int(path.stem.split("_")[1]), row) for row in rows]
        if len(found) >= SHOWN_SAMPLES:
            break
    return found[:SHOWN_SAMPLES]


def _sample(step: int, row: dict[str, Any]) -> str:
    steps = row["step_map"] or []
    last = max(steps, default=0)
    tokens = []
    for text, when in zip(row["token_texts"], steps or [1] * len(row["token_texts"]), strict=True):
        hue = 165 - 140 * (when - 1) / max(1, last - 1) if when else 0
        tokens.append(f'<b data-s={int(when)} style="background:hsl({hue:.0f} 60% 60% / .3)">{html.escape(text)}</b>')
    slider = f"<input type=range min=0 max={last} value={last}><output class=soft></output>" if steps else ""
    return (
        f"<div class='card sample'><h3>step {step} · reward {row['reward']:.3g} · advantage {row['advantage']:.2f} "
        f"<span class=soft>{html.escape(row['uid'])}</span></h3><pre class=soft>{html.escape(row['prompt'])}</pre>"
        f"<div class=tokens>{''.join(tokens)}</div>{slider}</div>"
    )
