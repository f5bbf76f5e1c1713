"""How the cluster fares, in numbers for metrics.jsonl and the summary: lag, idle shares, memory by role."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlpipe.monitor.spans import WAITING, Interval, length, union
from rlpipe.monitor.timeline import place

LAGS = 8  # lags with a share of their own; larger ones share one
METERED = {"rollout", "verifier", "learner", "value", "judge", "guide"}  # roles that somebody pays for to be busy


def lag_metrics(lags: Sequence[int]) -> dict[str, float]:
    """rollout/lag_mean, lag_max and the share of each lag that occurs, lag_share_0 … lag_share_8_up.

    lags: of each group trained on, in weight versions; empty gives nothing. One below 0 (sampled with weights that a rollback
    took back) counts as 0.
    """
    if not lags:
        return {}
    lags = [max(0, int(lag)) for lag in lags]
    counts = Counter(min(lag, LAGS) for lag in lags)
    top = max(counts)
    shares = {f"rollout/lag_share_{lag}{'_up' if lag == LAGS else ''}": counts[lag] / len(lags) for lag in range(top + 1)}
    return {"rollout/lag_mean": sum(lags) / len(lags), "rollout/lag_max": float(max(lags))} | shares


class IdleMeter:
    """Idle share of each role between two readings, from the spans of its workers.

    A span is told when it ends, perhaps after the reading of the steps in which it ran. So work above the time that passed is
    kept for the readings that follow: a long unit shows as idle first and as busy later, and the sum over a run is right.
    Only workers that told of a span count, of the roles METERED.
    """

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock, self._since = clock, clock()
        self._lock = threading.Lock()
        self._told: dict[str, list[Interval]] = {}  # since the last reading
        self._kept: dict[str, float] = {}  # busy seconds carried over, by track

    def add(self, track: str, name: str, start: float, end: float) -> None:
        """A span; from any thread."""
        if place(track)[0] in METERED and not name.startswith(WAITING):
            with self._lock:
                self._told.setdefault(track, []).append((start, end))

    def reading(self) -> dict[str, float]:
        """{role: share of its workers' time since the last reading in which they did nothing}, 0 to 1."""
        with self._lock:
            now = self._clock()
            passed, self._since = now - self._since, now
            told = {track: length(union(spans)) for track, spans in self._told.items()}
            self._told = {}
            if passed <= 0:
                passed = 0.0
            idle: dict[str, list[float]] = {}
            for track in sorted({*told, *self._kept}):
                work = self._kept.get(track, 0.0) + told.get(track, 0.0)
                busy = min(work, passed)
                self._kept[track] = work - busy
                idle.setdefault(place(track)[0], []).append(1.0 - busy / passed if passed else 0.0)
        return {role: sum(shares) / len(shares) for role, shares in idle.items()}


def memory_metrics(replies: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, float]:
    """cluster/memory_ROLE_mb (largest peak of a worker's resident memory), cluster/gpu_memory_ROLE_mb (likewise, where there
    is one) and cluster/node_memory_share (of the fullest node). replies: what `usage()` gave, by role."""
    metrics: dict[str, float] = {}
    for role, facts in ((role, list(facts)) for role, facts in replies.items()):
        for key, name in (("peak_rss_mb", "memory"), ("gpu_peak_mb", "gpu_memory")):
            values = [float(one[key]) for one in facts if key in one]
            if values:
                metrics[f"cluster/{name}_{role}_mb"] = max(values)
    shares = [float(one["node_memory_share"]) for facts in replies.values() for one in facts if "node_memory_share" in one]
    return metrics | ({"cluster/node_memory_share": max(shares)} if shares else {})


def cluster_summary(metrics: Sequence[Mapping[str, Any]], incidents: Mapping[str, float]) -> dict[str, Any]:
    """For summary.json, from what lies in the run's folder, so over all starts: the totals of incidents.jsonl, the largest
    lag, and the idle share of each role, weighted by the steps' lengths."""
    lags = [line["rollout/lag_max"] for line in metrics if line.get("rollout/lag_max") is not None]
    roles = sorted({key.removeprefix("cluster/idle_") for line in metrics for key in line if key.startswith("cluster/idle_")})
    idle = {}
    for role in roles:
        lines = [line for line in metrics if line.get(f"cluster/idle_{role}") is not None]
        weights = [line.get("perf/step_s") or 0.0 for line in lines]
        if sum(weights):
            weighted = sum(w * line[f"cluster/idle_{role}"] for w, line in zip(weights, lines, strict=True))
            idle[role] = weighted / sum(weights)
    return {**incidents, **({"max_lag": int(max(lags))} if lags else {}), **({"idle": idle} if idle else {})}
