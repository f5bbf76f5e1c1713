"""The report's section about the cluster: curves of its health, the end of the timeline, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlpipe.monitor.curves import Series, chart
from rlpipe.monitor.gantt import gantt
from rlpipe.monitor.overlap import table, use_of
from rlpipe.monitor.spans import Trace

LISTED = 200  # incidents, the newest
CHARTS = (  # title, {name of the line: key}
    ("Lag of the groups trained on, versions", {"mean": "rollout/lag_mean", "most": "rollout/lag_max"}),
    ("Idle share", {"rollout": "cluster/idle_rollout", "learner": "cluster/idle_learner", "verifier": "cluster/idle_verifier"}),
    ("Groups", {"under way": "cluster/groups_under_way", "ready": "cluster/groups_ready"}),
    ("Units of work that wait for a worker", {"units": "cluster/units_waiting"}),
    ("Seconds to hand on the weights", {"sync": "perf/sync_s"}),
    ("Fullest object store, share", {"share": "cluster/object_store_share"}),
    ("Fullest node's memory, share", {"share": "cluster/node_memory_share"}),
    (
        "Memory of the largest process, MiB",
        {"rollout": "cluster/memory_rollout_mb", "learner": "cluster/memory_learner_mb", "driver": "cluster/memory_driver_mb"},
    ),
    ("GPU memory, MiB", {"rollout": "cluster/gpu_memory_rollout_mb", "learner": "cluster/gpu_memory_learner_mb"}),
)
MARKED = ("restart", "rollback", "resume", "interruption")  # kinds of incidents that curves have lines for


def cluster_section(metrics: Sequence[Mapping[str, Any]], incidents: Sequence[Mapping[str, Any]], trace: Trace | None) -> str:
    """HTML; "" for a run that left nothing about its cluster. metrics, incidents: lines of the files of these names."""
    marks: dict[int, list[str]] = {}
    for line in incidents:
        if line["kind"] in MARKED:
            marks.setdefault(line["step"], []).append(line["kind"])
    figures = []
    for title, lines in CHARTS:
        series = [
            Series(name, [(line["step"], line[key]) for line in metrics if key in line])
            for name, key in lines.items()
            if any(key in line for line in metrics)
        ]
        figures.append(chart(title, series, events=marks))
    curves = "".join(figures)
    picture = _picture(trace) if trace is not None else ""
    if not any(line.get("cluster/restarts") is not None for line in metrics) and not (picture or incidents):
        return ""
    return f'<h2>Cluster</h2><div class="curves">{curves}</div>{picture}{_incidents(incidents)}'


def _picture(trace: Trace) -> str:
    drawing = gantt(trace)
    if not drawing:
        return ""
    text = escape("\n".join(table(use_of(trace))))
    return f'{drawing}<details><summary>Shares and overlap of the whole run</summary><pre class="use">{text}</pre></details>'


def _incidents(incidents: Sequence[Mapping[str, Any]]) -> str:
    if not incidents:
        return ""
    rows = "".join(
        f'<tr><td>{time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["time"]))}</td><td class="n">{line["step"]}</td>'
        f"<td>{escape(line['kind'])}</td><td>{escape(str(line.get('text', '')))}</td></tr>"
        for line in incidents[-LISTED:]
    )
    count = f"{len(incidents)}" + (f", the last {LISTED} of them" if len(incidents) > LISTED else "")
    heads = '<tr><th>time</th><th class="n">step</th><th>what</th><th>what was done</th></tr>'
    return f"<details><summary>Incidents: {count}</summary><table>{heads}{rows}</table></details>"
