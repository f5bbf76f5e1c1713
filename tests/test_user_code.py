"""A user's own method, as the README shows it, and what is said when it cannot be found."""

import re
from pathlib import Path

import numpy as np
import pytest
from tiny_models import prompts, sample, tiny

from rlpipe import recipe
from rlpipe.errors import ConfigError
from rlpipe.objectives.objective import build_objective

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf8")


@pytest.fixture
def method(tmp_path) -> Path:
    """The README's example as a file."""
    (code,) = re.findall(r"```python\n(# my_method\.py.*?)```", README, re.DOTALL)
    path = tmp_path / "my_method.py"
    path.write_text(code, encoding="utf8")
    return path


@pytest.mark.parametrize("kind", ("block", "full"))
def test_the_readmes_method_plans_rows(method, kind):
    changes = [f"algo.preset={method}:LAST_TOKENS", "algo.options={count: 2}", "algo.ratio=sequence"]
    cfg = recipe.load(["recipe=quickstart", *changes])
    recipe.check(cfg)
    objective = build_objective(cfg.algo, 16)
    model, tokenizer = tiny(kind)
    (trajectory,), _ = sample(model, prompts(tokenizer, 1), max_tokens=8)
    rows = objective.plan_all([trajectory], np.random.default_rng(0))[0]
    assert rows.scored.sum(1).tolist() == [1, 1] and rows.scored[-1, trajectory.valid_len - 1]
    assert len(objective.units(rows, trajectory)) == 1


def test_a_method_that_is_not_there_is_named(method, tmp_path):
    for name, parts in {
        f"{method}:LAST_TOKEN": ("did you mean LAST_TOKENS", "algo.preset"),
        f"{tmp_path}/none.py:X": ("there is no file",),
        "tracerll": ("did you mean tracerl",),
    }.items():
        with pytest.raises(ConfigError) as error:
            build_objective(recipe.load(["recipe=quickstart", f"algo.preset={name}"]).algo)
        assert all(part in str(error.value) for part in parts)
    cfg = recipe.load(["recipe=quickstart", f"algo.preset={method}:LAST_TOKENS", "algo.options={cuont: 2}"])
    with pytest.raises(ConfigError, match="did you mean count"):
        build_objective(cfg.algo)
