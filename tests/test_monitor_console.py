"""The console on a terminal and elsewhere."""

import io
import re

import pytest

from rlpipe.monitor.console import COLUMNS, HEADER_EVERY, Console, header, printable, row

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")
FULL = {column.key: 0.125 for column in COLUMNS}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(console: Console) -> list[str]:
    return [line.rstrip() for line in ANSI.sub("", console.stream.getvalue()).splitlines()]


def test_rows_stand_under_their_titles():
    title, full = header(), row(12, FULL)
    assert len(title) == len(full)
    assert title.split() == ["step", "reward", "solved", "live", "clip", "entropy", "grad", "parity", "tok/s", "s/step"]
    assert full.split() == ["12", "0.125", "0.125", "0", "0.1250", "0.125", "0.125", "1.2e-01", "0", "0.12"]


def test_missing_values_are_blank_and_broken_ones_show():
    text = row(3, {"reward/mean": 0.5, "algo/entropy": float("nan"), "perf/step_s": 2.0, "eval/other": 0.5})
    assert text.split() == ["3", "0.500", "nan", "2.00"]
    assert text.index("nan") + 3 == header().index("entropy") + len("entropy")


def test_the_header_comes_back():
    console = Console(io.StringIO())
    for step in range(HEADER_EVERY + 1):
        console.row(step, FULL)
    shown = lines(console)
    assert [i for i, line in enumerate(shown) if line == header()] == [0, HEADER_EVERY + 1]
    assert len(shown) == HEADER_EVERY + 3


def test_a_terminal_gets_the_same_rows_in_colour():
    plain, terminal = Console(io.StringIO()), Console(Terminal())
    for console in (plain, terminal):
        console.row(1, FULL | {"algo/grad_norm": float("inf")})
        console.row(2, {"reward/mean": 0.5})
    assert lines(plain) == lines(terminal)
    assert "\x1b[" in terminal.stream.getvalue() and "\x1b[" not in plain.stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_hostile_text_moves_no_cursor(stream):
    console = Console(stream())
    console.line("[bold]a[/bold] \x1b[2J\x07 ü\u202e" + "x" * 300)
    text = lines(console)
    assert text == ["[bold]a[/bold] \\x1b[2J\\x07 ü\\u202e" + "x" * 300]
    assert "\x07" not in console.stream.getvalue()
    assert printable("a\tb\nc\ud800") == "a\tb\nc\\ud800"


def test_a_stream_that_lacks_a_character_gets_a_question_mark():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    Console(stream).line("4×4 → ok")
    assert raw.getvalue() == b"4?4 ? ok\n"


def test_plain_progress_is_a_line_at_most_every_so_often():
    closed = []
    console = Console(io.StringIO(), progress_s=0.0)
    with console.phase("sampling", 3, closed.append) as phase:
        for _ in range(3):
            phase.advance()
    assert lines(console) == ["sampling: 0/3 (0 s)", "sampling: 1/3 (0 s)", "sampling: 2/3 (0 s)"]
    assert closed == ["sampling: 3/3 (0 s)"]
    quiet = Console(io.StringIO(), progress_s=3600.0)
    with quiet.phase("sampling", 3, closed.append) as phase:
        phase.advance(2)
    assert lines(quiet) == ["sampling: 0/3 (0 s)"] and closed[-1] == "sampling: 2/3 (0 s)"


def test_a_phase_without_a_total_or_without_work():
    closed = []
    console = Console(io.StringIO(), progress_s=0.0)
    with console.phase("loading", None, closed.append):
        pass
    with console.phase("reading", 0, closed.append) as phase:
        phase.advance(5)
    assert lines(console) == ["loading …", "reading …", "reading: 5 (0 s)"]
    assert closed == ["loading: done (0 s)", "reading: 5 (0 s)"]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_phase_that_fails_says_where(stream):
    closed = []
    console = Console(stream())
    with pytest.raises(KeyError), console.phase("scoring", 4, closed.append) as phase:
        phase.advance()
        raise KeyError("x")
    assert closed == ["scoring: stopped at 1/4 (0 s)"]


def test_bars_inside_bars_share_one_display_and_vanish():
    closed = []
    console = Console(Terminal())
    for _ in range(2):
        with (
            console.phase("outer", 2, closed.append) as outer,
            console.phase("inner [x]", None, closed.append) as inner,
        ):
            inner.advance(3)
            console.line("a note between")
            outer.advance(2)
    assert closed == ["inner [x]: 3 (0 s)", "outer: 2/2 (0 s)"] * 2
    assert console._open_bars == 0 and not console._bars.tasks
    assert sum("a note between" in line for line in lines(console)) == 2
    assert "outer" in ANSI.sub("", console.stream.getvalue())
