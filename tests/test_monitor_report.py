"""The report: a page that loads nothing, obeys nothing that a model wrote, and draws what was logged."""

import json
import re
from html.parser import HTMLParser

import pytest
from test_monitor import open_monitor, sample

from rlpipe.errors import CheckpointError
from rlpipe.monitor.curves import MAX_POINTS, Series, chart, number, thin, ticks
from rlpipe.monitor.report import SHOWN_STEPS, chosen_samples, main, render, write_report
from rlpipe.monitor.samples import SampleStore

HOSTILE = '</script><script>alert("x")</script><img src=http://evil.example/a onerror=alert(1)>&amp;\u2028'


class Page(HTMLParser):
    """Elements, attributes and the text of scripts."""

    VOID = {"meta", "input", "path", "circle"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.scripts = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    def samples(self) -> list:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "samples"))


def a_run(tmp_path, **changes):
    monitor = open_monitor(tmp_path)
    for step in range(4):
        monitor.log(step, {"eval/accuracy": step / 4, "eval/odd": 1.0, "reward/mean": 0.5, "parity/max_abs_delta": 1e-6})
        monitor.samples(step, [sample(step, **changes)])
    return monitor


def test_model_output_stays_text(tmp_path):
    monitor = a_run(tmp_path, prompt=HOSTILE, response=HOSTILE, token_texts=[HOSTILE, "b", "c"], parts={HOSTILE: HOSTILE})
    monitor.finish({"steps": 3}, status="finished")
    text = (monitor.run_dir / "report.html").read_text()
    page = Page(text)
    assert not page.open, "every element is closed"
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert page.samples()[0]["rows"][0]["prompt"] == HOSTILE
    assert page.samples()[0]["rows"][0]["token_texts"][0] == HOSTILE
    code = page.scripts[-1][1]
    assert "alert" not in code and "innerHTML" not in code and "document.write" not in code


def test_recipe_and_metric_names_stay_text():
    config = {"name": HOSTILE, "description": HOSTILE, HOSTILE: {"x": HOSTILE}}
    metrics = [{"step": 1, f"eval/{HOSTILE}": 1.0}, {"step": 2, f"eval/{HOSTILE}": None}]
    page = Page(render(config, metrics, {"status": HOSTILE, "eval_start": None}, []))
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_the_page_loads_nothing(tmp_path):
    monitor = a_run(tmp_path)
    monitor.finish({"steps": 3}, status="finished")
    text = (monitor.run_dir / "report.html").read_text()
    page = Page(text)
    assert not {"link", "iframe", "img", "object"} & set(page.tags)
    assert not any(name in ("src", "href", "srcset") for name, _ in page.attributes)
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_the_headline_the_curves_and_the_tables(tmp_path):
    monitor = a_run(tmp_path)
    summary = {"steps": 3, "eval_start": 0.25, "eval_final": 0.75, "seconds": 12.0, "tokens_per_s": 321.0}
    monitor.finish(summary, status="finished")
    text = (monitor.run_dir / "report.html").read_text()
    assert "0.250 → 0.750" in text and "+0.500" in text and ">321<" in text
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert titles == ["Held-out accuracy", "Mean reward", "Parity: largest |Δ log p|", "eval/odd"]
    assert "<td>eval/accuracy</td>" in text and "<th>name</th><td>toy</td>" in text
    assert "<th>machine.cpu_count</th>" in text


def test_a_run_that_goes_on_can_be_looked_at(tmp_path, capsys):
    monitor = a_run(tmp_path)
    assert main([str(monitor.run_dir)]) == 0
    text = (monitor.run_dir / "report.html").read_text()
    assert ">running<" in text and "0.000 → 0.750" in text, "without a summary the metrics tell"
    assert main([str(tmp_path / "nothing")]) == 1
    assert "config.yaml cannot be read" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize("config", ["a: [1", "- a list", ""])
def test_a_broken_config_is_an_error(tmp_path, config):
    monitor = a_run(tmp_path)
    (monitor.run_dir / "config.yaml").write_text(config)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        write_report(monitor.run_dir)


def test_samples_are_spread_over_the_run_and_bounded(tmp_path, monkeypatch):
    store = SampleStore(tmp_path)
    for step in range(50):
        store.write(step, [sample(i) for i in range(3)])
    chosen = chosen_samples(store)
    steps = [entry["step"] for entry in chosen]
    assert len(steps) == SHOWN_STEPS and steps[0] == 0 and steps[-1] == 49
    assert all(len(entry["rows"]) == 3 for entry in chosen)
    monkeypatch.setattr("rlpipe.monitor.report.SHOWN_TOKENS", 6 * SHOWN_STEPS)
    assert all(len(entry["rows"]) == 2 for entry in chosen_samples(store)), "two samples of three tokens fit in six"


def path_of(svg: str) -> str:
    return re.search(r'class="line s0" d="([^"]*)"', svg).group(1)


def test_a_line_breaks_at_missing_values_and_stays_inside():
    svg = chart("x", [Series("x", [(0, 1.0), (1, None), (2, 3.0), (3, float("nan")), (4, 2.0), (5, 5.0)])])
    path = path_of(svg)
    assert [part[0] for part in re.findall(r"[ML][\d. ]+", path)] == ["M", "M", "M", "L"]
    numbers = [float(n) for n in re.findall(r"[\d.]+", path)]
    assert all(46 <= x <= 350 for x in numbers[::2]) and all(8 <= y <= 146 for y in numbers[1::2])
    assert 'aria-label="x over training steps"' in svg


@pytest.mark.parametrize("values", [[0.0], [2.5, 2.5], [0.0, 0.0], [-1.0, -1.0], [1e-12, 1e-12], [-3.0, 5e6]])
def test_flat_single_and_extreme_lines_are_drawn(values):
    svg = chart("x", [Series("x", list(enumerate(values)))])
    assert "nan" not in svg and "inf" not in svg and path_of(svg)


def test_a_log_axis_leaves_out_what_it_cannot_show():
    svg = chart("x", [Series("x", [(0, 0.0), (1, 1e-6), (2, 1e-5)])], log=True, limit=1e-3)
    assert path_of(svg).count("L") == 1 and "limit 0.001" in svg and 'class="limit"' in svg
    assert chart("x", [Series("x", [(0, 0.0), (1, None)])], log=True) == ""


def test_thinning_keeps_spikes_and_ends():
    points = [(i, 0.0 if i != 4321 else 9.0) for i in range(10_000)]
    kept = thin(points)
    assert len(kept) <= MAX_POINTS + 2 and (4321, 9.0) in kept and kept[0] == points[0] and kept[-1] == points[-1]
    assert kept == sorted(kept)
    assert thin(points[:5]) == points[:5]


def test_round_ticks_and_short_numbers():
    assert ticks(0.0, 0.64) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert ticks(2600, 3400) == pytest.approx([2600, 2800, 3000, 3200, 3400])
    shown = [number(v) for v in (None, 0.0, 0.43125, 1234.4, 1e-6, 3.14e-7, -2.5)]
    assert shown == ["–", "0", "0.4313", "1234", "1e-06", "3.1e-07", "-2.5"]
