"""The bench of weight transport: every way on a tiny model, figures that add up. Nothing is timed."""

import json

import pytest
import torch

from rlpipe.bench import __main__ as entry
from rlpipe.bench.live_bytes import LiveBytes

pytestmark = pytest.mark.timeout(600)


def test_live_bytes_are_what_is_held_at_a_time():
    given = torch.zeros(1000)
    with LiveBytes() as live:
        for _ in range(3):
            made = given + 1
            made.mul_(2)
            part = made[:10]
            del made
            del part
        assert live.now == 0 and live.peak == 4000
        kept = [given.double(), given.half()]
    assert live.now == live.peak == 10_000
    del kept
    assert live.now == 0


def test_what_cannot_be_is_refused_before_anything_starts(capsys):
    for arguments in (["transports=store,pigeon"], ["zero_stage=4"], ["worker=2"]):
        assert entry.main(["sync", *arguments]) == 2
    assert "did you mean workers" in capsys.readouterr().err


def test_the_command_writes_a_report(ray_session, tmp_path, capsys):
    out = tmp_path / "sync.json"
    arguments = ["model=tiny:block", "workers=1", "zero_stage=3", "repeat=1", f"out={out}"]
    assert entry.main(["sync", *arguments]) == 0
    report = json.loads(out.read_text(encoding="utf8"))
    assert report["transports"].keys() == {"store", "broadcast", "shared"}
    for found in report["transports"].values():
        assert found["bytes"] >= 4 * report["parameters"] and found["fallbacks"] == 0
        assert found["gathers"] == found["buckets"] == 1 and found["learner_peak"] > 0
    assert "gathers a bucket" in capsys.readouterr().out
