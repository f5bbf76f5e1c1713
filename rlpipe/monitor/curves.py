"""Line charts as inline SVG: no script and no file is needed to see them; a script adds a reading under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22  # margins around the plot, in px
MAX_POINTS = 400


@dataclass(frozen=True, slots=True)
class Series:
    """points: (step, value), in order of steps; a value of None breaks the line."""

    name: str
    points: Sequence[tuple[int, float | None]]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    limit: float | None = None,
    events: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """One figure with a line per series over the training step.

    log: a decadic axis; values that are not positive are left out. limit: a dashed line, with its value in the caption.
    events: by step, what a vertical line stands for. Returns "" if no series has a finite value.
    """
    series = [Series(s.name, thin([(x, v if _drawable(v, log) else None) for x, v in s.points])) for s in series]
    values = [v for s in series for _, v in s.points if v is not None]
    if not values:
        return ""
    axis = _Axis([*values, limit] if limit and _near(limit, values, log) else values, log)
    steps = [x for s in series for x, _ in s.points]
    first, last = min(steps), max(steps)

    def across(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    parts = [_grid(axis, first, last)]
    if limit and axis.low <= limit <= axis.high:
        parts.append(f'<path class="limit" d="M{LEFT} {axis.down(limit):.1f}H{WIDTH - RIGHT}"/>')
    parts += [_event(step, names, across) for step, names in (events or {}).items() if first <= step <= last]
    parts += [_line(s, index, across, axis) for index, s in enumerate(series)]
    caption = _caption(title, series, limit)
    return (
        f'<figure class="curve" data-marks="{escape(_marks(series, across))}"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over training steps">'
        f'{"".join(parts)}<path class="cursor"/></svg></figure>'
    )


def thin(points: Sequence[tuple[int, float | None]], most: int = MAX_POINTS) -> list[tuple[int, float | None]]:
    """At most about `most` points: lowest and highest of each stretch, so that spikes stay; first and last too."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = [i for i in range(start, min(start + size, len(points))) if points[i][1] is not None]
        if stretch:
            kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        else:
            kept.add(start)
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that span [low, high]: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, end + 1)]


def number(value: float | None) -> str:
    """A short readable figure: 0.4312, 1234, 3.1e-07, 1e-06."""
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}".replace(".0e", "e")


class _Axis:
    """The vertical axis: where a value lies, and its ticks."""

    def __init__(self, values: Sequence[float], log: bool):
        self.log = log
        low, high = min(values), max(values)
        if log:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            last = max(last, first + 1)
            every = math.ceil((last - first) / 4)
            self.ticks = [10.0**i for i in range(first, last + every, every)]
        else:
            if 0 < low < 0.5 * high:  # close enough to zero to show it
                low = 0.0
            spread = high - low or abs(high) * 0.2 or 1.0
            self.ticks = ticks(low if high > low else low - spread / 2, high if high > low else high + spread / 2)
        self.low, self.high = self.ticks[0], self.ticks[-1]

    def down(self, value: float) -> float:
        scale = math.log10 if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _drawable(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _near(limit: float, values: Sequence[float], log: bool) -> bool:
    """The limit is worth showing only where it does not press the curve flat."""
    return log or limit <= 3 * max(values)


def _grid(axis: _Axis, first: int, last: int) -> str:
    lines = [
        f'<path class="grid" d="M{LEFT} {axis.down(t):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{axis.down(t) + 3.5:.1f}" text-anchor="end">{number(t)}</text>'
        for t in axis.ticks
    ]
    ends = f'<text x="{LEFT}" y="{HEIGHT - 6}">step {first}</text>'
    if last > first:
        ends += f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{last}</text>'
    return "".join(lines) + ends


def _line(series: Series, index: int, across: Callable[[int], float], axis: _Axis) -> str:
    """A path that lifts its pen at missing values; dots where a value stands alone or points are few."""
    path, dots = [], []
    finite = sum(value is not None for _, value in series.points)
    previous = None
    for position, (step, value) in enumerate(series.points):
        if value is None:
            previous = None
            continue
        x, y = across(step), axis.down(value)
        path.append(f"{'L' if previous is not None else 'M'}{x:.1f} {y:.1f}")
        following = series.points[position + 1][1] if position + 1 < len(series.points) else None
        if finite <= 12 or (previous is None and following is None):
            dots.append(f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>')
        previous = value
    return f'<path class="line s{index}" d="{"".join(path)}"/>{"".join(dots)}'


def _event(step: int, names: Sequence[str], across: Callable[[int], float]) -> str:
    text = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    line = f'<path d="M{across(step):.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
    return f'<g class="incident"><title>{escape(f"step {step}: {text}")}</title>{line}</g>'


def _caption(title: str, series: Sequence[Series], limit: float | None) -> str:
    last = [next((v for _, v in reversed(s.points) if v is not None), None) for s in series]
    if len(series) == 1:
        shown = f'<span class="now">{number(last[0])}</span>'
    else:
        shown = " ".join(
            f'<span class="key s{i}"></span>{escape(s.name)} <span class="now">{number(v)}</span>'
            for i, (s, v) in enumerate(zip(series, last, strict=True))
        )
    note = f' <span class="note">limit {number(limit)}</span>' if limit else ""
    return f'<b>{escape(title)}</b> <span class="values">{shown}{note}</span><span class="reading"></span>'


def _marks(series: Sequence[Series], across: Callable[[int], float]) -> str:
    """JSON [[x in px, "step 12: 0.43"], …] for the reading under the pointer."""
    at: dict[int, list[str]] = {}
    for s in series:
        for step, value in s.points:
            if value is not None:
                at.setdefault(step, []).append(f"{s.name} {number(value)}" if len(series) > 1 else number(value))
    return json.dumps([[round(across(step), 1), f"step {step}: {', '.join(texts)}"] for step, texts in sorted(at.items())])
