"""The end of a timeline as inline SVG: a row a worker, a bar a span; no script is needed to read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from rlpipe.monitor.curves import number, ticks
from rlpipe.monitor.spans import Interval, Span, Trace
from rlpipe.monitor.timeline import place

WIDTH, ROW, LEFT, TOP, BOTTOM = 1120, 18, 120, 8, 24  # px
STEPS, SECONDS = 4, 60.0  # shown: the last steps, or, where the driver told of none, the last seconds
PER_ROLE = 8  # workers of a role with a row each
BARS = 1500  # of all rows together
COLOURS = "blue sampling, orange learning, green the rest, grey waiting, red failed"
FINEST = 0.7  # px: bars closer than that and as short become one


def gantt(trace: Trace) -> str:
    """One figure; "" if there is nothing to show."""
    window = _window(trace)
    if window is None:
        return ""
    begin, end = window
    rows, left_out = _rows(trace, window)
    if not rows:
        return ""
    height = TOP + ROW * len(rows) + BOTTOM
    scale = (WIDTH - LEFT) / (end - begin)
    parts = [*_frame(window, scale, height), *_bars(rows, window, scale), *_marks(trace, window, scale, height)]
    hidden = f" · not shown: {', '.join(f'{count} more {role}' for role, count in left_out.items())}" if left_out else ""
    legend = f"the last {number(round(end - begin, 3))} s: {COLOURS}; a dashed line is an incident{hidden}"
    return (
        f'<figure class="gantt"><figcaption><b>Who worked when</b> <span class="values">{escape(legend)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="The last steps">{"".join(parts)}</svg></figure>'
    )


def _window(trace: Trace) -> Interval | None:
    """The last STEPS steps of the last start, or the last SECONDS seconds."""
    if not trace.spans:
        return None
    end = max(span.end for span in trace.spans)
    started = max((start for start in trace.starts if start < end), default=trace.spans[0].start)
    steps = [step for step in trace.steps() if step.end > started][-STEPS:]
    if steps:
        return steps[0].start, max(step.end for step in steps)
    begin = max(end - SECONDS, started)
    return (begin, end) if end > begin else None


def _rows(trace: Trace, window: Interval) -> tuple[list[tuple[str, list[Span]]], dict[str, int]]:
    """(track, its spans in the window) in order, and by role how many tracks were left out."""
    rows: list[tuple[str, list[Span]]] = []
    shown: dict[str, int] = {}
    left_out: dict[str, int] = {}
    for track, spans in trace.by_track().items():
        spans = [span for span in spans if span.end > window[0] and span.start < window[1]]
        role = place(track)[0]
        if not spans:
            continue
        if shown.get(role, 0) == PER_ROLE:
            left_out[role] = left_out.get(role, 0) + 1
            continue
        shown[role] = shown.get(role, 0) + 1
        rows.append((track, spans))
    return rows, left_out


def _frame(window: Interval, scale: float, height: int) -> Iterator[str]:
    """Seconds below."""
    begin, end = window
    bottom = height - BOTTOM
    for second in ticks(0.0, end - begin, 8):
        if second <= end - begin:
            x = LEFT + second * scale
            yield f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>'
            yield f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{number(round(second, 6))} s</text>'


def _bars(rows: Sequence[tuple[str, list[Span]]], window: Interval, scale: float) -> Iterator[str]:
    budget = max(20, BARS // len(rows))
    for index, (track, spans) in enumerate(rows):
        y = TOP + ROW * index
        yield f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(track)}</text>'
        drawn: list[tuple[float, float, Span, int]] = []
        for span in spans:
            x = LEFT + (max(span.start, window[0]) - window[0]) * scale
            width = max(FINEST, (min(span.end, window[1]) - max(span.start, window[0])) * scale)
            tiny = drawn and width <= 2 * FINEST and drawn[-1][1] <= 40 * FINEST and drawn[-1][2].name == span.name
            if tiny and x - (drawn[-1][0] + drawn[-1][1]) < FINEST:
                first, _, kept, count = drawn[-1]
                drawn[-1] = (first, x + width - first, kept, count + 1)
            else:
                drawn.append((x, width, span, 1))
        for x, width, span, count in drawn[-budget:]:
            yield (
                f'<rect class="{_kind(span)}" x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{ROW - 5}" rx="2">'
                f"<title>{escape(_title(span, count))}</title></rect>"
            )


def _kind(span: Span) -> str:
    if not span.succeeded:
        return "bar-failed"
    if not span.works:
        return "bar-wait"
    if span.track == "driver":
        return "bar-driver"
    return {"rollout": "bar-rollout", "learner": "bar-learner", "value": "bar-learner"}.get(span.role, "bar-other")


def _title(span: Span, count: int) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in span.args.items())
    several = f" and {count - 1} more like it" if count > 1 else ""
    return f"{span.track}: {span.name}{several}, {number(round(span.end - span.start, 6))} s{f' ({facts})' if facts else ''}"


def _marks(trace: Trace, window: Interval, scale: float, height: int) -> Iterator[str]:
    for mark in trace.marks:
        if window[0] <= mark.start <= window[1]:
            x = LEFT + (mark.start - window[0]) * scale
            text = f"{mark.track}: {mark.args.get('text', mark.name)}"
            yield f'<g class="incident"><title>{escape(text)}</title><path d="M{x:.1f} {TOP}V{height - BOTTOM}"/></g>'
