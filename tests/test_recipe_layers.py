"""What later layers of a recipe do to earlier ones: the command line is one layer, and data belong to a task."""

import itertools

import pytest

from rlpipe import recipe
from rlpipe.errors import ConfigError
from rlpipe.eval.settings import load as load_evaluation

OPTIONS = "rollout.decoder.options"


@pytest.mark.parametrize(
    "overrides, key, value",
    [
        (["algo.preset=wd1", "algo.clip_low=0.05"], "algo.clip_low", 0.05),
        (["rollout.decoder.preset=sdar_dynamic", "rollout.decoder.threshold=0.5"], "rollout.decoder.threshold", 0.5),
        (["rollout.decoder={preset: eb_sampler}", "rollout.decoder.options.gamma=0.1"], OPTIONS, {"gamma": 0.1}),
        (["data.task=countdown", "data.options={numbers_low: 3}"], "data.options", {"numbers_low": 3}),
        (["data.task=records", "data.train=a.jsonl", "data.test=b.jsonl"], "data.train", "a.jsonl"),
    ],
)
def test_the_order_on_the_command_line_does_not_matter(overrides, key, value):
    for order in itertools.permutations(overrides):
        cfg = recipe.load(["recipe=quickstart", *order])
        for name in key.split("."):
            cfg = getattr(cfg, name)
        assert cfg == value, order


def test_a_wrong_override_is_refused_beside_a_right_one_of_its_section():
    with pytest.raises(ConfigError, match="learner is a section"):
        recipe.load(["recipe=quickstart", "learner=fast", "learner.lr=1e-4"])
    with pytest.raises(ConfigError, match="a space behind the colon"):
        recipe.load(["recipe=quickstart", "verifier.parts={sudoku:1}"])


def test_another_task_takes_nothing_of_the_one_before(tmp_path):
    path = tmp_path / "records.yaml"
    path.write_text("data: {task: records, train: a.jsonl, test: b.jsonl, format: verl, template: boxed}\n", encoding="utf8")
    for load in (recipe.load, load_evaluation):
        same = load([f"recipe={path}", "data.task=records", "data.test=c.jsonl"]).data
        assert (same.train, same.test, same.format) == ("a.jsonl", "c.jsonl", "verl")
        other = load([f"recipe={path}", "data.task=gsm8k"]).data
        assert (other.train, other.test, other.format, other.template) == ("", "", "auto", "boxed")
        mixed = load([f"recipe={path}", "data.mixture=[{task: gsm8k}]"]).data
        assert (mixed.train, mixed.test, len(mixed.mixture)) == ("", "", 1)


def test_a_task_replaces_a_mixture(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text("data: {mixture: [{task: gsm8k}, {task: sudoku}]}\n", encoding="utf8")
    kept = tmp_path / "kept.yaml"
    kept.write_text(recipe.to_yaml(recipe.load([f"recipe={path}"])), encoding="utf8")
    for source in (path, kept):
        assert len(recipe.load([f"recipe={source}", "seed=1"]).data.mixture) == 2
        assert recipe.load([f"recipe={source}", "data.task=countdown"]).data.mixture == []
        assert recipe.load([f"recipe={source}", "data.task=sudoku"]).data.mixture == []
