"""Collecting a step's groups: filtering, refilling, failed groups, step rewards; with pools that answer from a script."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from test_trajectory import MONOTONE, trajectory

from rlpipe.collection import Collector
from rlpipe.config import RunConfig
from rlpipe.errors import NoLiveGroups, VerifierFailed
from rlpipe.objectives.objective import build_objective
from rlpipe.rollout.pool import Group
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Predictions, Prompt


@dataclass
class Script:
    """Cursor, rollouts, verifiers and monitor in one: prompt i gets rewards[i]; None fails the group."""

    rewards: list
    taken: int = 0
    warnings: list = field(default_factory=list)

    def take(self, count):
        self.taken += count
        return [Prompt(uid=f"p/{i}", task="t", text="q") for i in range(self.taken - count, self.taken)]

    def generate(self, prompts, samples, decoder, *, what, predictions=0):
        assert not predictions
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


STEPS = Predictions(step=np.arange(3), tokens=np.zeros((3, 4), np.int32), confidence=np.zeros((3, 4), np.float32))


@dataclass
class StepScript(Script):
    """Prompt i has a response for each of paths[i], the texts that its three predictions read; the last is the answer. A text's
    first character is its reward, x fails the group."""

    asked: list = field(default_factory=list)

    def generate(self, prompts, samples, decoder, *, what, predictions=0):
        assert predictions == 2, "the planner's stride"
        groups = []
        for prompt in prompts:
            paths = [path.split() for path in self.rewards[int(prompt.uid[2:])]]
            records = [replace(trajectory(MONOTONE, uid=prompt.uid, sample=s), predictions=STEPS) for s in range(len(paths))]
            texts = [tuple(dict.fromkeys(path)) for path in paths]
            index = [np.array([own.index(text) for text in path]) for own, path in zip(texts, paths, strict=True)]
            answers = [path[-1] for path in paths]
            groups.append(Group(prompt, records, answers, step_texts=texts, step_index=index))
        return groups, EngineCounters(tokens=1, responses=1)

    def score_groups(self, groups):
        self.asked += [[text for _, text in group] for group in groups]
        return [
            VerifierFailed("it hung")
            if any(text[0] == "x" for _, text in group)
            else [{"reward": float(text[0]), "length": float(len(text))} for _, text in group]
            for group in groups
        ]


def collect_steps(paths, **algo):
    cfg = RunConfig()
    cfg.verifier.max_failed_groups = 0.5
    cfg.algo.preset, cfg.algo.options = "mdpo", {"stride": 2}
    cfg.algo.prompts_per_step, cfg.algo.samples_per_prompt = len(paths), 2
    for name, value in algo.items():
        setattr(cfg.algo, name, value)
    script = StepScript(paths)
    return Collector(cfg, script, script, script, build_objective(cfg.algo), script).collect(5), script


def test_predictions_are_scored_once_a_text_and_steps_get_their_rewards():
    harvest, script = collect_steps([["0a 1b 0a", "0c 1b 1d"]], groups="keep")
    assert script.asked == [["0a", "1d", "1b", "0c"]]
    group = harvest.groups[0]
    assert [t.step_rewards.tolist() for t in harvest.trajectories] == [[0, 1, 0], [0, 1, 1]]
    assert all(t.step_rewards.dtype == np.float32 for t in harvest.trajectories)
    assert group.rewards.tolist() == [0, 1] and group.parts[1] == {"reward": 1.0, "length": 2.0}
    metrics = harvest.metrics
    assert metrics["reward/mean"] == 0.5 and metrics["reward/step_mean"] == pytest.approx(3 / 6)
    assert metrics["reward/backslide_share"] == 0.5, "the first was right on the way"
    assert metrics["reward/verifier_calls"] == 4 and metrics["reward/verifier_calls_saved"] == pytest.approx(1 - 4 / 8)


def test_a_group_that_ends_alike_teaches_if_its_steps_differ():
    backslid, same, wrong = ["0a 1b 0c", "0a 0b 0c"], ["0a 1b 1b", "0c 1d 1d"], ["0a 0b 0c", "0a 0a 0a"]
    harvest, _ = collect_steps([backslid, same, wrong], groups="drop")
    assert [g.prompt.uid for g in harvest.groups] == ["p/0"] and harvest.metrics["algo/live_share"] == pytest.approx(1 / 3)
    assert harvest.metrics["reward/backslide_share"] == pytest.approx(1 / 6)
    rows = build_objective(_mdpo()).plan_all(harvest.trajectories, np.random.default_rng(0))
    assert all(len(own) for own in rows)
    with pytest.raises(NoLiveGroups):
        collect_steps([same, wrong], groups="drop")


def _mdpo():
    cfg = RunConfig()
    cfg.algo.preset = "mdpo"
    return cfg.algo


def test_a_prediction_that_cannot_be_scored_fails_its_group():
    harvest, script = collect_steps([["0a xb 0c", "0a 0b 0c"], ["0a 1b 1c", "0a 0b 0c"]], groups="keep")
    assert [g.prompt.uid for g in harvest.groups] == ["p/1"]
    assert harvest.metrics["reward/failed_groups"] == 1 and "it hung" in script.warnings[0]
