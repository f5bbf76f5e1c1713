"""What rollout and update that overlap must not be told."""

import pytest

from rlpipe import recipe
from rlpipe.errors import ConfigError


def warnings(*overrides: str) -> list[str]:
    return recipe.check(recipe.load(["recipe=quickstart", *overrides]))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout.oversample=0.5"], "at least 1"),
        (["rollout.order=freshest"], "use mode=async max_lag=1"),
        (["rollout.order=freshest", "mode=async", "max_lag=0"], "same weights"),
        (["max_lag=-1", "mode=async"], "max_lag"),
        (["mode=asynchron"], "did you mean async"),
        (["rollout.transport=nccl"], "rollout.transport"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        warnings(*overrides)


def test_what_costs_something_is_said():
    assert warnings() == warnings("mode=async") == warnings("mode=async", "rollout.order=freshest", "max_lag=2")
    assert any("oversample=1.5" in line for line in warnings("rollout.oversample=1.5"))
    lazy = warnings("mode=async", "rollout.partial=false", "rollout.transport=broadcast")
    assert any("object store" in line for line in lazy)
