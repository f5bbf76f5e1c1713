"""The learner's bench: both sides give one loss and one gradient, and its counts are the arithmetic of packing."""

import json

import numpy as np
import pytest
import torch
from tiny_models import tiny

from rlpipe.bench import __main__ as entry
from rlpipe.bench.experience import draw_step, draw_trajectories
from rlpipe.bench.learner import packed, published
from rlpipe.bench.settings import LearnerSettings, read
from rlpipe.errors import ConfigError

ARGUMENTS = ["model=tiny:block", "groups=2", "samples=3", "prompt_len=12", "response_len=8", "repeat=1", "threads=1"]


@pytest.mark.parametrize("tokens_per_step, shrink", [(1, 1), (2, 1), (1, 2)])
def test_experience_replays_block_by_block(tokens_per_step, shrink):
    numbers = {"tokens_per_step": tokens_per_step, "shrink": shrink}
    settings = LearnerSettings(groups=2, samples=2, prompt_len=5, response_len=11, **numbers)
    model, _ = tiny("block")
    for trajectory in draw_trajectories(settings, model):
        steps = trajectory.step_map()
        blocks = (5 + np.arange(11)) // 4
        assert (steps > 0).all() and all(np.diff([steps[blocks == b].min() for b in np.unique(blocks)]) > 0)
        assert max(np.bincount(steps)[1:]) == tokens_per_step
    plan, _ = draw_step(settings, model)
    assert len(plan.samples[0].scored) == -(-4 // (tokens_per_step * shrink))


@pytest.mark.parametrize("budget", (40, 10_000))
def test_both_sides_agree_and_count_what_the_arithmetic_says(budget):
    settings = LearnerSettings(groups=2, samples=3, prompt_len=12, response_len=8)
    model, _ = tiny("block")
    model.train()
    plan, objective = draw_step(settings, model)
    found, gradients = [], []
    for run in (lambda: packed(model, plan.samples, objective, budget), lambda: published(model, plan.samples, objective)):
        model.zero_grad(set_to_none=True)
        found.append(run())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad(set_to_none=True)
    ours, theirs = found
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    assert float((gradients[0] - gradients[1]).abs().max()) <= 1e-5 * float(gradients[1].abs().max())
    assert ours["scored"] == ours["head_rows"] == theirs["scored"] == 6 * 8
    assert theirs["tokens"] == 6 * 4 * (12 + 2 * 8)
    if budget == 10_000:  # a prompt a group; a response's clean copy without its last block, and four noisy rows
        assert ours["tokens"] == 2 * 12 + 6 * (8 - 4 + 4 * 8)


def test_the_command_prints_and_writes_a_whole_report(tmp_path, capsys):
    assert entry.main(["learner", *ARGUMENTS, f"out={tmp_path / 'b.json'}"]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    for key in ("tokens_ratio", "time_ratio", "head_rows_ratio", "max_grad_diff", "floor_ratio", "memory_ratio", "settings"):
        assert report[key] is not None
    assert report["tokens_ratio"] == pytest.approx(6 * 4 * 28 / (24 + 6 * 36))
    assert "packed" in capsys.readouterr().out
    assert entry.main(["learner", *ARGUMENTS, "baselines=none"]) == 0


@pytest.mark.parametrize("argument, part", [("model=tiny:full", "block models"), ("prompt_len=13", "block size 4"),
                                            ("sample=3", "samples"), ("n=3", "Known: model")])  # fmt: skip
def test_wrong_arguments_are_refused(argument, part, capsys):
    assert entry.main(["learner", *ARGUMENTS, argument]) == 2
    assert part in capsys.readouterr().err


def test_settings_are_checked():
    assert read(["groups=3"], LearnerSettings).groups == 3
    with pytest.raises(ConfigError, match="at least 1"):
        read(["samples=0"], LearnerSettings)
