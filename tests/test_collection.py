"""A step's groups: filtering, refilling, failed groups, step rewards; with pools that answer from a script."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from test_trajectory import MONOTONE, trajectory

from rlpipe.config import RunConfig
from rlpipe.errors import NoLiveGroups, VerifierFailed
from rlpipe.feed import Feed
from rlpipe.objectives.objective import build_objective
from rlpipe.objectives.overlong import penalty
from rlpipe.rollout.pool import Group
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Predictions, Prompt


@dataclass
class Script:
    """Cursor, rollouts, verifiers and monitor in one: prompt i gets rewards[i]; None fails the group."""

    rewards: list
    taken: int = 0
    warnings: list = field(default_factory=list)
    rates: dict = field(default_factory=dict)
    stops: str = ""  # of a group's responses: l for length, anything else for eos

    units_waiting = 0

    @property
    def index(self):
        return self.taken

    def take(self, count):
        self.taken += count
        return [Prompt(uid=f"p/{i}", task="t", text="q") for i in range(self.taken - count, self.taken)]

    def submit(self, *args, **settings):
        """Of rollouts: prompts, samples, decoder, take; of verifiers: items, take. Both answer at once."""
        if len(args) == 2:
            return self.judge(*args)
        prompts, samples, _, take = args
        for index, prompt in enumerate(prompts):
            group, counters = self.group(prompt, samples, settings["predictions"])
            take(index, group, counters)
        return []

    def group(self, prompt, samples, predictions):
        assert not predictions
        records = [self.record(prompt.uid, sample) for sample in range(samples)]
        return Group(prompt, records, ["x"] * samples), EngineCounters(tokens=3 * samples, responses=samples)

    def judge(self, items, take):
        take(self.score_groups([items])[0])
        return len(items), self.count_judged(items)

    def count_judged(self, items):
        return 1

    def record(self, uid, sample):
        stop = "length" if self.stops[sample : sample + 1] == "l" else "eos"
        return replace(trajectory(MONOTONE, uid=uid, sample=sample), stop=stop)

    def score_groups(self, groups):
        rewards = [self.rewards[int(group[0][0].uid[2:])] for group in groups]
        return [VerifierFailed("it hung") if r is None else [self.verdict(v) for v in r] for r in rewards]

    def verdict(self, value):
        if isinstance(value, float):
            return {"reward": value, "half": value / 2}
        return dict(zip(("reward", "correct"), value, strict=True))

    def warn(self, text):
        self.warnings.append(text)

    def solved(self, groups):
        self.rates.update({prompt.uid: sum(rewards) / len(rewards) for prompt, rewards in groups})


ALL, NONE, MIXED = [1.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 0.0]


def collect(rewards, failed_share=0.25, stops="", **algo):
    cfg = RunConfig()
    cfg.rollout.decoder.max_tokens = 4
    cfg.verifier.max_failed_groups = failed_share
    cfg.algo.prompts_per_step, cfg.algo.samples_per_prompt = 3, 4
    for name, value in algo.items():
        setattr(cfg.algo, name, value)
    script = Script(rewards, stops=stops)
    return take(cfg, script), script


def take(cfg, script):
    """The harvest of step 5."""
    feed = Feed(cfg, script, script, script, build_objective(cfg.algo), script)
    feed.step = 5
    feed.publish(4)
    return feed.take(5)


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


def test_accuracy_bounds_are_of_what_is_correct_when_rewards_are_made_of_parts():
    wrong, mixed = [(0.1, 0.0), (0.0, 0.0), (0.1, 0.0), (0.0, 0.0)], [(1.1, 1.0), (0.1, 0.0), (0.1, 0.0), (0.0, 0.0)]
    assert len(collect([wrong, mixed, mixed], groups="drop")[0].groups) == 3, "a wrong group can still learn the format"
    harvest, _ = collect([wrong, mixed, mixed], groups="drop", accuracy_low=0.2, accuracy_high=0.8)
    assert [group.prompt.uid for group in harvest.groups] == ["p/1", "p/2"]
    assert harvest.metrics["reward/correct"] == pytest.approx(2 / 12)


def test_nothing_to_learn_says_what_was_seen():
    with pytest.raises(NoLiveGroups, match=r"step 5: none of 9 groups in 3 rounds.*mean reward 0.333.*warm start"):
        collect([NONE, NONE, ALL] * 5)


def test_a_failed_group_goes_whole_and_too_many_stop_the_run():
    harvest, script = collect([MIXED, MIXED, None, MIXED], failed_share=0.4)
    assert [g.prompt.uid for g in harvest.groups] == ["p/0", "p/1", "p/3"]
    assert harvest.metrics["reward/failed_groups"] == 1 and "it hung" in script.warnings[0]
    assert harvest.metrics["reward/mean"] == pytest.approx(0.25), "a failure is not a reward of 0"
    with pytest.raises(VerifierFailed, match="1 of 3 groups.*it hung"):
        collect([None, None, MIXED])


def test_overlong_answers_score_as_any_unless_told_otherwise():
    harvest, _ = collect([[1.0, 1.0, 0.0, 0.0]] * 3, stops="lxlx")
    assert harvest.metrics["rollout/overlong_share"] == 0.5 and "reward/before_overlong" not in harvest.metrics
    np.testing.assert_allclose(harvest.advantages[:4], [1, 1, -1, -1])


def test_overlong_answers_can_earn_nothing():
    harvest, _ = collect([[1.0, 1.0, 0.0, 0.0], MIXED, [1.0, 1.0, 0.0, 0.0]], stops="lxxx", overlong="zero", groups="drop")
    assert [g.prompt.uid for g in harvest.groups] == ["p/0", "p/2"], "the only right answer of p/1 never ended"
    np.testing.assert_allclose(harvest.advantages[:4], np.array([-1, 3, -1, -1]) / 3**0.5, rtol=1e-6)
    assert harvest.metrics["reward/mean"] == pytest.approx(2 / 12)
    assert harvest.metrics["reward/before_overlong"] == pytest.approx(5 / 12)
    assert [part["reward"] for part in harvest.groups[0].parts] == [1, 1, 0, 0], "the verdict itself stays"


def test_overlong_answers_can_be_left_out_of_the_loss_and_still_count_in_the_mean():
    full, _ = collect([[1.0, 1.0, 0.0, 0.0]] * 3)
    harvest, _ = collect([[1.0, 1.0, 0.0, 0.0]] * 3, stops="lxxl", overlong="drop")
    assert [(t.uid, t.sample) for t in harvest.trajectories] == [(f"p/{i}", s) for i in range(3) for s in (1, 2)]
    np.testing.assert_array_equal(harvest.advantages, full.advantages.reshape(3, 4)[:, 1:3].ravel())
    assert len(harvest.groups[0].trajectories) == 4 and harvest.metrics["reward/mean"] == 0.5
    with pytest.raises(NoLiveGroups, match="algo.overlong=drop struck 100%"):
        collect([MIXED] * 9, stops="llll", overlong="drop")


def test_overlong_answers_can_be_penalised_softly():
    harvest, _ = collect([ALL, ALL, ALL], stops="lxxx", overlong="soft", overlong_buffer=2)
    assert harvest.groups[0].rewards.tolist() == [0.0, 0.5, 0.5, 0.5], "three valid tokens of four, of which two are buffer"
    assert harvest.metrics["reward/before_overlong"] == 1.0


def test_the_soft_penalty_is_a_straight_line():
    record = trajectory(MONOTONE)
    got = [penalty(replace(record, valid_len=n), 100, 20) for n in (1, 80, 81, 90, 100)]
    assert got == [0, 0, pytest.approx(-0.05), -0.5, -1]
    assert penalty(replace(record, valid_len=100, stop="length"), 100, 20) == -1
    assert penalty(replace(record, valid_len=85), 100, 0) == pytest.approx(-0.4), "a quarter of the budget"


STEPS = Predictions(step=np.arange(3), tokens=np.zeros((3, 4), np.int32), confidence=np.zeros((3, 4), np.float32))


@dataclass
class StepScript(Script):
    """Prompt i has a response for each of paths[i], the texts that its three predictions read; the last is the answer. A text's
    first character is its reward, x fails the group."""

    texts: list = field(default_factory=list)

    def group(self, prompt, samples, predictions):
        assert predictions == 2, "the planner's stride"
        paths = [path.split() for path in self.rewards[int(prompt.uid[2:])]]
        records = [replace(trajectory(MONOTONE, uid=prompt.uid, sample=s), predictions=STEPS) for s in range(len(paths))]
        texts = [tuple(dict.fromkeys(path)) for path in paths]
        index = [np.array([own.index(text) for text in path]) for own, path in zip(texts, paths, strict=True)]
        made = Group(prompt, records, [path[-1] for path in paths], step_texts=texts, step_index=index)
        return made, EngineCounters(tokens=1, responses=1)

    def count_judged(self, items):
        return len({text for _, text in items})

    def score_groups(self, groups):
        self.texts += [[text for _, text in group] for group in groups]
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
    return take(cfg, script), script


def test_predictions_are_scored_with_the_responses_and_steps_get_their_rewards():
    harvest, script = collect_steps([["0a 1b 0a", "0c 1b 1d"]], groups="keep")
    assert script.texts == [["0a", "1d", "0a", "1b", "0a", "0c", "1b", "1d"]]
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
