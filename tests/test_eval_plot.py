"""The plot: well-formed, everything inside the frame, labels legible, the frontier as defined."""

import re
from xml.etree import ElementTree

import pytest

from rlpipe.eval.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Point, frontier, svg

SVG = "{http://www.w3.org/2000/svg}"


def point(label, x, y, margin=0.05, **more):
    return Point(label, (x, x - margin, x + margin), (y, max(0.0, y - margin), min(1.0, y + margin)), **more)


POINTS = [
    point("rollout", 1.0, 0.76),
    point("sdar_dynamic", 2.6, 0.28),
    point("sdar_dynamic threshold=0.5", 3.31, 0.154),
    point("eb_sampler", 3.28, 0.135, filled=False),
    Point("<&>", (1.0, None, None), (0.37, None, None)),
]


def drawn(points, title="t"):
    return ElementTree.fromstring(svg(points, title))


def test_every_decoder_has_its_mark_and_its_name():
    root = drawn(POINTS, "a < b")
    marks = root.findall(f"{SVG}circle")
    assert len(marks) == 5 and [mark.get("class") for mark in marks].count("point open") == 1
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert {p.label for p in POINTS} <= set(texts) and "a < b" in texts
    assert len([path for path in root.findall(f"{SVG}path") if path.get("class") == "bar"]) == 4
    assert "var(" not in svg(POINTS, "t"), "not every viewer knows variables"
    assert not re.search(r"(href|src|url)\b", svg(POINTS, "t")), "self-contained"


@pytest.mark.parametrize(
    "points",
    [
        POINTS,
        [Point("alone", (1.0, None, None), (0.0, None, None))],
        [point("same", 2.0, 1.0), point("place", 2.0, 1.0), point("thrice", 2.0, 1.0)],
        [point("below zero", 1.0, -0.5), point("reward above one", 30.0, 2.5)],
        [point(f"decoder number {i}", 1 + i / 100, 0.5 + i / 200) for i in range(12)],
    ],
)
def test_marks_lie_inside_the_frame_and_labels_apart(points):
    root = drawn(points)
    for mark in root.findall(f"{SVG}circle"):
        assert LEFT <= float(mark.get("cx")) <= WIDTH - RIGHT and TOP <= float(mark.get("cy")) <= HEIGHT - BOTTOM
    labels = [text for text in root.findall(f"{SVG}text") if text.text in {p.label for p in points}]
    boxes = []
    for label in labels:
        x, width = float(label.get("x")), 6.5 * len(label.text)
        left = x - width if label.get("text-anchor") == "end" else x
        boxes.append((left, float(label.get("y")), left + width))
        assert left >= LEFT - 1 and left + width <= WIDTH + 1
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert abs(a[1] - b[1]) >= 11 or a[0] >= b[2] or b[0] >= a[2], "two labels on one another"


def test_the_axis_of_shares_ends_at_one():
    ticks = [float(text.text) for text in drawn(POINTS).findall(f"{SVG}text") if re.fullmatch(r"[\d.]+", text.text or "")]
    assert max(tick for tick in ticks if tick <= 1) == 1 and len(ticks) >= 8


def test_the_frontier_is_of_those_that_no_other_beats():
    labels = [p.label for p in frontier(POINTS)]
    assert labels == ["rollout", "sdar_dynamic", "sdar_dynamic threshold=0.5"]
    assert [p.label for p in frontier([point("slow", 1.0, 0.5), point("fast and better", 2.0, 0.6)])] == ["fast and better"]
    for one in POINTS:
        beaten = any(o.x[0] >= one.x[0] and o.y[0] >= one.y[0] and (o.x[0], o.y[0]) != (one.x[0], one.y[0]) for o in POINTS)
        assert beaten == (one not in frontier(POINTS))


def test_long_titles_and_notes_stay_on_the_page():
    root = ElementTree.fromstring(svg(POINTS, f"gym:{'+'.join(['sum'] * 40)}: 9 prompts × 4 samples", "HEX: the vote"))
    (title,) = [text.text for text in root.findall(f"{SVG}text") if text.get("class") == "title"]
    assert title.startswith("gym:") and title.endswith("9 prompts × 4 samples")
    assert LEFT + 9.4 * len(title) < WIDTH
    below = [text for text in root.findall(f"{SVG}text") if text.get("class") == "soft" and text.get("x") == str(LEFT)]
    assert [text.text[:6] for text in below] == ["filled", "HEX: t"] and len({text.get("y") for text in below}) == 2
    assert all(LEFT + 6 * len(text.text) < WIDTH and float(text.get("y")) < HEIGHT for text in below)


def test_nothing_to_plot():
    with pytest.raises(ValueError):
        svg([], "t")
