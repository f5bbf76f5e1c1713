"""Style and script of the report: all of it is inside the page, which loads nothing."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f5f2; --card: #fdfdfc; --ink: #14130f; --soft: #57564f; --rule: #e1e0d9;
  --s0: #2a78d6; --s1: #d9601a; --s2: #188a66; --good: #17754f; --bad: #b3362a;
  --early: #e3eefb; --late: #7fb0ec; --now: #d9601a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141413; --card: #1d1d1b; --ink: #f2f1ec; --soft: #b9b8af; --rule: #34342f;
    --s0: #5a9cec; --s1: #ee8a4b; --s2: #46b78e; --good: #56c596; --bad: #f0857a;
    --early: #1c2f45; --late: #2f6bb8; --now: #ee8a4b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1160px; margin: 0 auto; }
h1 { font-size: 22px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 16px; margin: 34px 0 10px; }
.lead { color: var(--soft); margin: 4px 0 20px; max-width: 80ch; }
.status { font-size: 12px; font-weight: 600; padding: 2px 9px; border-radius: 10px; border: 1px solid currentColor;
  vertical-align: 3px; margin-left: 8px; color: var(--bad); }
.status.finished { color: var(--good); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0; }
.tile, .curve, .replay, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { flex: 1 1 auto; padding: 12px 16px; }
.tile dt { color: var(--soft); font-size: 13px; }
.tile dd { margin: 0; font-size: 24px; font-weight: 600; white-space: nowrap;
  font-variant-numeric: tabular-nums; letter-spacing: -.02em; }
.tile small { display: block; font-size: 13px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 12px; }
.curve { margin: 0; padding: 10px 12px 4px; }
.curve figcaption { display: flex; flex-wrap: wrap; gap: 2px 10px; font-size: 13px; min-height: 40px;
  align-content: start; }
.curve .values, .curve .reading { color: var(--soft); }
.curve .reading { display: none; font-variant-numeric: tabular-nums; }
.curve.read .reading { display: inline; } .curve.read .values { display: none; }
.now { color: var(--ink); font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 10px; height: 3px; border-radius: 2px; vertical-align: 4px; margin-right: 3px; }
.key.s0 { background: var(--s0); } .key.s1 { background: var(--s1); } .key.s2 { background: var(--s2); }
svg { display: block; width: 100%; height: auto; }
svg text { font: 10px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; }
.limit { stroke: var(--bad); stroke-dasharray: 4 3; }
.incident path { stroke: var(--bad); stroke-width: 1.2; stroke-dasharray: 2 3; opacity: .7; }
.gantt { margin: 12px 0 0; padding: 10px 12px 4px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; }
.gantt figcaption { font-size: 13px; margin-bottom: 6px; } .gantt .values { color: var(--soft); }
.bar-rollout { fill: var(--s0); } .bar-learner { fill: var(--s1); } .bar-other { fill: var(--s2); }
.bar-driver { fill: var(--rule); stroke: var(--soft); stroke-width: .4; } .bar-wait { fill: var(--soft); opacity: .35; }
.bar-failed { fill: var(--bad); }
.use { font: 12px/1.5 ui-monospace, "SF Mono", Consolas, monospace; overflow-x: auto; margin: 8px 0 0; }
.cursor { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.line.s0 { stroke: var(--s0); } .line.s1 { stroke: var(--s1); } .line.s2 { stroke: var(--s2); }
.dot.s0 { fill: var(--s0); } .dot.s1 { fill: var(--s1); } .dot.s2 { fill: var(--s2); }
.replay { padding: 16px; }
.bar { display: flex; flex-wrap: wrap; gap: 10px 14px; align-items: center; }
.bar input[type=range] { flex: 1 1 180px; accent-color: var(--s0); }
.bar select, .bar button { font: inherit; padding: 4px 10px; border-radius: 7px; border: 1px solid var(--rule);
  background: var(--page); color: inherit; max-width: 100%; }
.bar button { min-width: 72px; cursor: pointer; }
.canvas + .bar { margin-top: 12px; }
.clock { min-width: 108px; font-variant-numeric: tabular-nums; color: var(--soft); }
.facts { margin: 12px 0 8px; color: var(--soft); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.label { font-size: 13px; color: var(--soft); margin: 10px 0 4px; }
.prompt, .canvas { font: 14px/1.75 ui-monospace, "SF Mono", Consolas, monospace; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 420px; overflow-y: auto; }
.tok { border-radius: 3px; padding: 1px 0; box-decoration-break: clone; -webkit-box-decoration-break: clone;
  background: color-mix(in oklab, var(--late) calc(var(--t, 0) * 100%), var(--early)); }
.tok.plain { background: none; }
.tok.open { background: none; color: var(--soft); }
.tok.fresh { box-shadow: 0 0 0 1.5px var(--now); }
.tok.after { opacity: .5; }
.ramp { display: inline-block; width: 90px; height: 10px; border-radius: 5px; vertical-align: -1px; margin: 0 6px;
  background: linear-gradient(90deg in oklab, var(--early), var(--late)); border: 1px solid var(--rule); }
details { padding: 10px 16px; margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 13px; margin-top: 8px; }
td, th { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""

SCRIPT = """
"use strict";
for (const figure of document.querySelectorAll(".curve")) {
  const marks = JSON.parse(figure.dataset.marks), svg = figure.querySelector("svg");
  const cursor = figure.querySelector(".cursor"), reading = figure.querySelector(".reading");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const x = (event.clientX - box.left) / box.width * view.width;
    let best = marks[0];
    for (const mark of marks) if (Math.abs(mark[0] - x) < Math.abs(best[0] - x)) best = mark;
    cursor.setAttribute("d", `M${best[0]} 8V146`);
    reading.textContent = best[1];
    figure.classList.add("read");
  });
  svg.addEventListener("pointerleave", () => { figure.classList.remove("read"); cursor.removeAttribute("d"); });
}

const replay = document.querySelector(".replay");
if (replay) {
  const data = JSON.parse(document.getElementById("samples").textContent);
  const find = name => replay.querySelector("." + name);
  const stepBox = find("step"), rowBox = find("row"), slider = find("slider"), play = find("play");
  let row, spans = [], timer = null;
  const option = (text, value) => new Option(text, value);
  const figure = value => value === null ? "not finite" : Number(value.toFixed(4)).toString();

  function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }

  function paint() {
    const now = Number(slider.value), last = Number(slider.max);
    spans.forEach((span, i) => {
      const at = row.step_map ? row.step_map[i] : 0, open = row.step_map && (at === 0 || at > now);
      span.className = "tok" + (!row.step_map ? " plain" : open ? " open" : "") + (at && at === now ? " fresh" : "")
        + (i >= row.tokens ? " after" : "");
      span.textContent = open ? "\\u00b7" : row.token_texts[i].replaceAll("\\n", "\\u21b5\\n");
      span.style.setProperty("--t", last > 1 ? (at - 1) / (last - 1) : 0);
      span.title = at ? "committed at step " + at : "";
    });
    find("clock").textContent = row.step_map ? "step " + now + " of " + last : "no single order";
  }

  function chooseRow() {
    stop();
    row = data[stepBox.value].rows[rowBox.value];
    const parts = Object.entries(row.parts).map(([name, value]) => name + " " + JSON.stringify(value));
    find("facts").textContent = [row.uid, "reward " + figure(row.reward), "advantage " + figure(row.advantage),
      row.tokens + " tokens in " + row.steps + " steps", ...parts].join("  \\u00b7  ");
    find("prompt").textContent = row.prompt;
    const canvas = find("canvas");
    canvas.replaceChildren();
    spans = row.token_texts.map(() => canvas.appendChild(document.createElement("span")));
    slider.max = row.step_map ? row.step_map.reduce((a, b) => Math.max(a, b), 1) : 1;
    slider.value = slider.max;
    slider.disabled = play.disabled = !row.step_map;
    paint();
  }

  function chooseStep() {
    const rows = data[stepBox.value].rows;
    rowBox.replaceChildren(...rows.map((r, i) => option("reward " + figure(r.reward) + " \\u00b7 " + r.uid, i)));
    chooseRow();
  }

  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (slider.value === slider.max) { slider.value = 0; paint(); }
    play.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      paint();
      if (slider.value === slider.max) stop();
    }, Math.max(30, Math.min(400, 6000 / Number(slider.max))));
  });
  slider.addEventListener("input", () => { stop(); paint(); });
  stepBox.addEventListener("change", chooseStep);
  rowBox.addEventListener("change", chooseRow);
  stepBox.replaceChildren(...data.map((entry, i) => option("training step " + entry.step, i)));
  stepBox.value = data.length - 1;
  chooseStep();
}
"""
