"""Accuracy against speed as one self-contained SVG: a point a decoder, with error bars, its name, and the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rlpipe.monitor.curves import number, ticks

WIDTH, HEIGHT = 760, 474
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 44, 72  # margins around the plot, in px
CHARACTER, LINE = 6.9, 14  # of a label, in px
TITLE_CHARACTER = 9.6  # of the title
CAP = 4  # half the width of an error bar's end
STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #14130f; }
text.soft { fill: #57564f; font-size: 11px; } text.title { font-size: 14px; font-weight: 600; }
text.name { paint-order: stroke; stroke: #fdfdfc; stroke-width: 3px; stroke-linejoin: round; }
.page { fill: #fdfdfc; } .rule { stroke: #e1e0d9; } .lead { stroke: #57564f; stroke-width: .7; }
.bar { stroke: #2a78d6; opacity: .55; } .point { fill: #2a78d6; stroke: #2a78d6; stroke-width: 1.8; }
.point.open { fill: #fdfdfc; } .front { fill: none; stroke: #d9601a; stroke-width: 1.4; stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
  text { fill: #f2f1ec; } text.soft { fill: #b9b8af; } text.name { stroke: #1d1d1b; }
  .page { fill: #1d1d1b; } .rule { stroke: #34342f; }
  .lead { stroke: #b9b8af; } .bar, .point { stroke: #5a9cec; } .point { fill: #5a9cec; } .front { stroke: #ee8a4b; }
  .point.open { fill: #1d1d1b; }
}
"""


@dataclass(frozen=True, slots=True)
class Point:
    """x, y: (value, low, high); the ends may be None. filled: an exact sampler."""

    label: str
    x: tuple[float, float | None, float | None]
    y: tuple[float, float | None, float | None]
    filled: bool = True


def points(results: dict) -> list[Point]:
    """Of the rows of results.json: pass@1, for HEX the vote, over tokens per forward. A vote takes all its responses for one
    answer, so its speed is divided by their number."""
    found = []
    for row in results["decoders"]:
        voted = bool(row["hex"])
        answers = results["samples"] * len(row["hex"]) if voted else 1
        speed = row["tokens_per_forward"]
        x = tuple(None if speed[end] is None else speed[end] / answers for end in ("value", "low", "high"))
        y = row["majority"] if voted and row["majority"] else row["pass"]["1"]
        found.append(Point(row["label"], x, (y["value"], y["low"], y["high"]), row["exact"]))
    return found


def frontier(found: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both accuracy and speed, from slow to fast."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (-p.x[0], -p.y[0])):
        if not best or point.y[0] > best[-1].y[0]:
            best.append(point)
    return best[::-1]


def svg(found: Sequence[Point], title: str, note: str = "") -> str:
    """A complete SVG document; accuracy up, speed to the right, a note below. Raises ValueError without points."""
    if not found:
        raise ValueError("nothing to plot")
    horizontal = _Axis([v for p in found for v in p.x if v is not None], LEFT, WIDTH - RIGHT)
    vertical = _Axis([v for p in found for v in p.y if v is not None], HEIGHT - BOTTOM, TOP, most=1.0)
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts = [
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="{LEFT}" y="22">{escape(_fitting(title))}</text>',
        *(_horizontal_rule(vertical.at(t), number(t)) for t in vertical.ticks),
        *(_vertical_rule(horizontal.at(t), number(t)) for t in horizontal.ticks),
        f'<text x="{middle:.0f}" y="{HEIGHT - 36}" text-anchor="middle">tokens per forward</text>',
        f'<text transform="translate(16 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">pass@1</text>',
        f'<text class="soft" x="{LEFT}" y="{HEIGHT - 20}">filled: exact sampler · open: approximate cache · dashed: no other '
        "is better in both</text>",
        f'<text class="soft" x="{LEFT}" y="{HEIGHT - 6}">{escape(note)}</text>',
    ]
    front = [f"{horizontal.at(p.x[0]):.1f} {vertical.at(p.y[0]):.1f}" for p in frontier(found)]
    parts += [f'<path class="front" d="M{"L".join(front)}"/>'] if len(front) > 1 else []
    parts += [_error_bars(p, horizontal, vertical) for p in found]
    parts += [_mark(p, horizontal, vertical) for p in found]
    parts += _labels(found, horizontal, vertical)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _fitting(title: str) -> str:
    """A title that is too long for the page without its middle; its end says how many prompts there were."""
    room = int((WIDTH - LEFT - RIGHT) / TITLE_CHARACTER)
    return title if len(title) <= room else f"{title[: room // 2]} … {title[len(title) - room // 2 + 3 :]}"


class _Axis:
    """Where a value lies between two pixels; the ticks span all values. most: no tick goes beyond it, if no value does."""

    def __init__(self, values: Sequence[float], first: float, last: float, most: float | None = None):
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        low, high = low - margin if low < 0 else max(0.0, low - margin), high + margin
        if most is not None and max(values) <= most:
            high = min(high, most)
        self.ticks = ticks(low, high, 5)
        self.first, self.last = first, last

    def at(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.first + share * (self.last - self.first)


def _horizontal_rule(y: float, text: str) -> str:
    rule = f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    return f'{rule}<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def _vertical_rule(x: float, text: str) -> str:
    rule = f'<path class="rule" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
    return f'{rule}<text class="soft" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>'


def _error_bars(point: Point, horizontal: _Axis, vertical: _Axis) -> str:
    x, y, path = horizontal.at(point.x[0]), vertical.at(point.y[0]), ""
    if point.y[1] is not None:
        low, high = vertical.at(point.y[1]), vertical.at(point.y[2])
        path += f"M{x:.1f} {low:.1f}V{high:.1f}M{x - CAP:.1f} {low:.1f}h{2 * CAP}M{x - CAP:.1f} {high:.1f}h{2 * CAP}"
    if point.x[1] is not None:
        low, high = horizontal.at(point.x[1]), horizontal.at(point.x[2])
        path += f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - CAP:.1f}v{2 * CAP}M{high:.1f} {y - CAP:.1f}v{2 * CAP}"
    return f'<path class="bar" d="{path}"/>' if path else ""


def _mark(point: Point, horizontal: _Axis, vertical: _Axis) -> str:
    kind = "point" if point.filled else "point open"
    said = f"{point.label}: {number(point.y[0])} at {number(point.x[0])}"
    x, y = horizontal.at(point.x[0]), vertical.at(point.y[0])
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(said)}</title></circle>'


def _labels(found: Sequence[Point], horizontal: _Axis, vertical: _Axis) -> list[str]:
    """Each name beside its point, where it covers least of marks, bars and other names; a thin line leads to distant ones."""
    centres = [(horizontal.at(p.x[0]), vertical.at(p.y[0])) for p in found]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    for point, (x, y) in zip(found, centres, strict=True):
        if point.y[1] is not None:
            taken.append((x - CAP, vertical.at(point.y[2]), x + CAP, vertical.at(point.y[1])))
        if point.x[1] is not None:
            taken.append((horizontal.at(point.x[1]), y - CAP, horizontal.at(point.x[2]), y + CAP))
    parts = []
    for point, (x, y) in sorted(zip(found, centres, strict=True), key=lambda item: item[1]):
        width = CHARACTER * len(point.label)
        best = None
        for distance in (0, 16, 32, 48, 64, 84, 104, 128):
            for right in (True, False):
                for sign in (-1, 1):
                    left = x + 9 if right else x - 9 - width
                    top = y - LINE / 2 + sign * distance
                    box = (left, top, left + width, top + LINE)
                    outside = left < LEFT or left + width > WIDTH - 2 or top < TOP - 10 or top + LINE > HEIGHT - BOTTOM
                    cost = sum(_overlap(box, other) for other in taken) + 1e6 * outside + 0.4 * distance
                    if best is None or cost < best[0]:
                        best = (cost, box, distance, right)
        _, box, distance, right = best
        taken.append(box)
        if distance > 16:
            parts.append(f'<path class="lead" d="M{x:.1f} {y:.1f}L{box[0] if right else box[2]:.1f} {box[1] + LINE / 2:.1f}"/>')
        place = f'x="{box[0]:.1f}"' if right else f'x="{box[2]:.1f}" text-anchor="end"'
        parts.append(f'<text class="name" {place} y="{box[3] - 3:.1f}">{escape(point.label)}</text>')
    return parts


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Common area in px²."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
