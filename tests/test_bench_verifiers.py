"""The bench of verifiers: its pairs are judged as they were made, its report is whole. Nothing is timed."""

import json
import random

import pytest

from rlpipe.bench import __main__ as entry
from rlpipe.bench.verifiers import HOSTILE, VerifierSettings, _expressions, _number, bench_math

pytest.importorskip("math_verify")


def test_every_kind_of_pair_is_judged_as_it_was_made():
    found = bench_math(VerifierSettings(pairs=60, seconds=1.0))
    assert found["mistaken"] == [] and found["verdicts"].keys() == {"right", "wrong"}
    assert sum(found["verdicts"].values()) == found["plain_pairs"] + found["cold_pairs"] == 120
    assert found["hostile"] == len(HOSTILE)


def test_pairs_depend_on_the_seed_alone():
    one, other = (_expressions(20, random.Random(3)) for _ in range(2))
    assert one == other and len(set(one)) == 20 and {right for *_, right in one} == {True, False}
    assert _number(random.Random(1)) == _number(random.Random(1))


def test_the_command_writes_a_report(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert entry.main(["verifiers", "only=math", "pairs=4", "seconds=0.5", f"out={out}"]) == 0
    report = json.loads(out.read_text(encoding="utf8"))
    assert {"settings", "math", "machine", "versions"} <= report.keys() and "code" not in report
    assert "math-verify" in report["versions"] and "pairs_per_s" in capsys.readouterr().out
    assert entry.main(["verifiers", "only=maths"]) == 2 and entry.main(["verifiers", "pair=4"]) == 2
    assert "did you mean pairs" in capsys.readouterr().err
