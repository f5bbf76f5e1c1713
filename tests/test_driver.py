"""The driver's way out, without a cluster: who is asked to end, and what is still saved when others end as well."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from rlpipe import interruption
from rlpipe.config import RunConfig
from rlpipe.driver import Driver
from rlpipe.errors import CheckpointError, Interrupted, LearnerLost


class Told:
    """Feed, checkpoints, turns, monitor and crew in one: remembers what it was asked for, and fails as told."""

    def __init__(self, **failures: Exception):
        self.failures, self.calls, self.warnings, self.trained, self.shared = failures, [], [], [], False

    def __getattr__(self, name):
        def method(*args, **settings):
            self.calls.append(name)
            if name in self.failures:
                raise self.failures[name]
            return {}

        return method

    def warn(self, text):
        self.warnings.append(text)

    def sleep(self):
        raise AssertionError("nobody shares anything")


def driver(step: int = 3, **failures: Exception) -> tuple[Driver, Told]:
    made, told = object.__new__(Driver), Told(**failures)
    made.cfg, made.state, made.restarts = RunConfig(), {"step": step}, 0
    made.feed = made.checkpoints = made.turns = made.monitor = told
    made.crew, made.timed = SimpleNamespace(trained=[]), lambda *args, **settings: nullcontext()
    return made, told


def test_whoever_leaves_gives_up_what_is_under_way_and_saves():
    made, told = driver()
    made.leave(Interrupted("SIGTERM"))
    assert told.calls.index("abandon") < told.calls.index("to_learner") < told.calls.index("save") < told.calls.index("finish")
    made, told = driver(step=0)
    made.leave(Interrupted("SIGTERM"))
    assert "save" not in told.calls and "finish" in told.calls, "nothing was trained"


@pytest.mark.parametrize("failure", [{"save": LearnerLost("rank 1 died")}, {"finish": CheckpointError("rank 1 died")}])
def test_ranks_that_go_with_the_driver_do_not_hide_that_it_was_asked_to_end(failure):
    made, told = driver(**failure)
    made.leave(Interrupted("SIGTERM"))
    assert "step 3 is not saved: rank 1 died" in told.warnings[0]


def test_a_run_that_was_asked_to_end_does_not_start_its_ranks_anew(monkeypatch):
    made, told = driver()

    def check():
        raise Interrupted("SIGTERM asked the run to end")

    monkeypatch.setattr(interruption, "check", check)
    with pytest.raises(Interrupted):
        made.recover(LearnerLost("rank 0 died"))
    assert "rank 0 died" in told.warnings[0] and "newest" not in told.calls
    made.cfg.learner.restarts = 1
    with pytest.raises(LearnerLost, match="lost 2 times"):
        made.recover(LearnerLost("rank 0 died"))
