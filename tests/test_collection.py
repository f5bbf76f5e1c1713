"""Collecting a step's groups: filtering, refilling, failed groups; with pools that answer from a script."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from test_trajectory import MONOTONE, trajectory

from rlpipe.collection import Collector
from rlpipe.config import RunConfig
from rlpipe.errors import NoLiveGroups, VerifierFailed
from rlpipe.objectives.objective import build_objective
from rlpipe.rollout.pool import Group
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Prompt


@dataclass
class Script:
    """Cursor, rollouts, verifiers and monitor in one: prompt i gets rewards[i]; None fails the group."""

    rewards: list
    taken: int = 0
    warnings: list = field(default_factory=list)

    def take(self, count):
        self.taken += count
        return [Prompt(uid=f"p/{i}", task="t", text="q") for i in range(self.taken - count, self.taken)]

    def generate(self, prompts, samples, decoder, *, what):
        groups = [
            Group(p, [trajectory(MONOTONE, uid=p.uid, sample=s) for s in range(samples)], ["x"] * samples) for p in prompts
        ]
        return groups, EngineCounters(tokens=3 * samples * len(prompts), responses=samples * len(prompts))

    def score_groups(self, groups):
        rewards = [self.rewards[int(group[0][0].uid[2:])] for group in groups]
        return [VerifierFailed("it hung") if r is None else [{"reward": v, "half": v / 2} for v in r] for r in rewards]

    def warn(self, text):
        self.warnings.append(text)


ALL, NONE, MIXED = [1.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 0.0]


def collect(rewards, failed_share=0.25, **algo):
    cfg = RunConfig()
    cfg.verifier.max_failed_groups = failed_share
    cfg.algo.prompts_per_step, cfg.algo.samples_per_prompt = 3, 4
    for name, value in algo.items():
        setattr(cfg.algo, name, value)
    script = Script(rewards)
    collector = Collector(cfg, script, script, script, build_objective(cfg.algo), script)
    return collector.collect(5), script


def test_groups_without_signal_are_replaced_by_fresh_prompts():
    harvest, script = collect([MIXED, ALL, NONE, MIXED, ALL, MIXED, MIXED])
    assert [g.prompt.uid for g in harvest.groups] == ["p/0", "p/3", "p/5"] and script.taken == 6
    assert harvest.tokens == 3 * 4 * 6 and harvest.metrics["rollout/rounds"] == 3
    assert harvest.metrics["reward/mean"] == pytest.approx((1 + 4 + 0 + 1 + 4 + 1) / 24)
    assert harvest.metrics["reward/half"] == pytest.approx(harvest.metrics["reward/mean"] / 2)
    np.testing.assert_allclose(harvest.advantages[:4], [3**0.5, *[-(3**-0.5)] * 3], rtol=1e-5)
    assert len(harvest.trajectories) == len(harvest.advantages) == 12


def test_refills_are_bounded_and_a_step_may_be_smaller():
    harvest, script = collect([MIXED] + [NONE] * 20, refill_rounds=1)
    assert len(harvest.groups) == 1 and script.taken == 5


def test_drop_and_keep():
    assert len(collect([MIXED, ALL, NONE], groups="drop")[0].groups) == 1
    kept, _ = collect([MIXED, ALL, NONE], groups="keep")
    assert len(kept.groups) == 3 and not kept.advantages[4:].any()
    assert kept.metrics["algo/live_groups"] == 1


def test_accuracy_bounds():
    harvest, _ = collect([MIXED, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]], groups="drop", accuracy_high=0.7)
    assert len(harvest.groups) == 2


def test_nothing_to_learn_says_what_was_seen():
    with pytest.raises(NoLiveGroups, match=r"step 5: none of 9 groups in 3 rounds.*mean reward 0.333.*warm start"):
        collect([NONE, NONE, ALL] * 5)


def test_a_failed_group_goes_whole_and_too_many_stop_the_run():
    harvest, script = collect([MIXED, MIXED, None, MIXED], failed_share=0.4)
    assert [g.prompt.uid for g in harvest.groups] == ["p/0", "p/1", "p/3"]
    assert harvest.metrics["reward/failed_groups"] == 1 and "it hung" in script.warnings[0]
    assert harvest.metrics["reward/mean"] == pytest.approx(0.25), "a failure is not a reward of 0"
    with pytest.raises(VerifierFailed, match="2 of 3 groups.*it hung"):
        collect([None, None, MIXED])
