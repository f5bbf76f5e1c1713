"""The feed under a simulated cluster: pools that finish in any order, fail, and are slow; every prompt has exactly one fate."""

import random
import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from test_trajectory import MONOTONE, trajectory

from rlpipe import feed as feed_module
from rlpipe import interruption
from rlpipe.config import RunConfig
from rlpipe.errors import Interrupted, RolloutFailed, VerifierFailed
from rlpipe.feed import Feed
from rlpipe.objectives.objective import build_objective
from rlpipe.rollout.pool import Group
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Prompt

MIXED, SAME = [1.0, 0.0], [1.0, 1.0]


class Source:
    identity = "source"

    def prompt(self, index: int) -> Prompt:
        return Prompt(uid=f"p/{index}", task="t", text="q")


@dataclass
class Cursor:
    index: int = 0
    source: Source = field(default_factory=Source)
    solved_uids: list = field(default_factory=list)

    def take(self, count):
        self.index += count
        return [self.source.prompt(i) for i in range(self.index - count, self.index)]

    def solved(self, groups):
        self.solved_uids += [prompt.uid for prompt, _ in groups]

    def state(self):
        return {"index": self.index}

    def restore(self, state):
        self.index = state["index"]


class Cluster:
    """Rollout pool and verifier pool in one, with a thread that finishes units in random order. The weights of a response are
    those at the time its unit is taken up, as with a worker that loads before it samples."""

    def __init__(self, seed: int = 0, workers: int = 3, unit: int = 2, pause: float = 0.001, fate=lambda index: MIXED):
        self.random, self.workers, self.unit, self.pause, self.fate = random.Random(seed), workers, unit, pause, fate
        self.version, self.queue, self.begun, self.cancelled = -1, [], [], []
        self.lock, self.ended = threading.Condition(), False
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def prompts_per_unit(self, samples):
        return self.unit

    @property
    def hungry(self):
        return len(self.queue) < self.workers

    @property
    def units_waiting(self):
        return len(self.queue)

    def cancel(self, ticket):
        self.cancelled.append(ticket)

    def submit(self, *args, **settings):
        if len(args) == 2:
            return self.judge(*args)
        prompts, samples, _, take = args
        tickets = []
        with self.lock:
            for at in range(0, len(prompts), self.unit):
                indices = list(range(at, min(at + self.unit, len(prompts))))
                ticket = object()
                self.begun += [int(prompts[i].uid[2:]) for i in indices]
                self.queue.append((ticket, [(i, prompts[i]) for i in indices], samples, take, []))
                tickets.append((indices, ticket))
            self.lock.notify()
        return tickets

    def judge(self, items, take):
        with self.lock:
            self.queue.append((None, items, 0, take, []))
            self.lock.notify()
        return len(items), len(items)

    def work(self):
        while not self.ended:
            with self.lock:
                if not self.queue:
                    self.lock.wait(0.01)
                    continue
                for job in self.queue[: self.workers]:
                    job[4][:] = job[4] or [self.version]
                ticket, items, samples, take, (version,) = self.queue.pop(
                    self.random.randrange(min(self.workers, len(self.queue)))
                )
            time.sleep(self.pause * self.random.random())
            if samples:
                self.random.shuffle(items)
                for place, prompt in items:
                    if ticket not in self.cancelled:
                        take(place, self.group(prompt, samples, version), EngineCounters(tokens=samples, responses=samples))
            else:
                take(self.verdict(int(items[0][0].uid[2:])))

    def group(self, prompt, samples, version):
        versions = np.array([version, version], np.int32)
        records = [replace(trajectory(MONOTONE, uid=prompt.uid, sample=s), versions=versions) for s in range(samples)]
        return Group(prompt, records, ["x"] * samples)

    def verdict(self, index):
        fate = self.fate(index)
        return VerifierFailed("it hung") if fate is None else [{"reward": reward} for reward in fate]


class Silent:
    def warn(self, text):
        pass


def settings(steps=12, **changes) -> RunConfig:
    cfg = RunConfig()
    cfg.steps, cfg.mode, cfg.max_lag, cfg.verifier.max_failed_groups = steps, "async", 1, 1.0
    cfg.algo.prompts_per_step, cfg.algo.samples_per_prompt, cfg.algo.groups = 4, 2, "refill"
    cfg.rollout.decoder.max_tokens = 4
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        setattr(getattr(cfg, section) if section else cfg, key, value)
    return cfg


def feed_of(cfg, cluster, cursor=None) -> Feed:
    return Feed(cfg, cursor or Cursor(), cluster, cluster, build_objective(cfg.algo), Silent())


def train(cfg, cluster, feed, first=1, last=None, pause=0.0):
    """Steps as the driver makes them; returns their harvests."""
    harvests = []
    cluster.version = first - 1
    feed.publish(first - 1)
    for step in range(first, (last or cfg.steps) + 1):
        harvests.append(feed.take(step))
        time.sleep(pause)
        cluster.version = step
        feed.publish(step)
    return harvests


def fates(harvests) -> list[int]:
    return sorted(index for h in harvests for indices in h.record.values() for index in indices)


def some_fail(index):
    return None if index % 7 == 3 else SAME if index % 3 == 1 else MIXED


@pytest.mark.parametrize("order", ["in_order", "freshest"])
@pytest.mark.parametrize("oversample", [1.0, 1.5])
@pytest.mark.parametrize("max_lag", [0, 1, 2])
def test_the_lag_is_bounded_and_every_prompt_has_one_fate(max_lag, oversample, order):
    cfg = settings(max_lag=max_lag, rollout__oversample=oversample, rollout__order=order)
    cluster = Cluster(seed=max_lag, fate=some_fail)
    feed = feed_of(cfg, cluster)
    harvests = train(cfg, cluster, feed, pause=0.002)
    cluster.ended = True
    assert all(max(h.lags) <= max_lag for h in harvests)
    seen, state = fates(harvests), feed.state()
    assert len(seen) == len(set(seen)), "no prompt is counted twice"
    assert sorted({*seen, *state["pending"]}) == list(range(state["cursor"]["index"])), "and none is lost"
    assert not set(seen) & set(state["pending"])
    assert sorted(int(uid[2:]) for uid in feed.cursor.solved_uids) == sorted(set(seen) - {i for i in seen if i % 7 == 3})
    if order == "in_order" and oversample == 1.0:
        trained = [index for h in harvests for index in h.record["trained"]]
        assert trained == sorted(trained), "prompts come in their order"
        assert state["pending"] == [] or max_lag > 0
    if max_lag == 0 and oversample == 1.0:
        assert len(cluster.begun) == len(seen), "nothing is begun twice, and nothing in vain"


def test_with_lag_work_goes_on_while_the_learner_learns_and_is_bounded():
    cfg = settings(max_lag=2, steps=50)
    cluster = Cluster(pause=0.0)
    feed = feed_of(cfg, cluster)
    cluster.version = 0
    feed.publish(0)
    feed.take(1)
    for _ in range(200):
        time.sleep(0.005)
        if len(feed.places) == 8 and not feed._in_the_air():
            break
    assert len(feed.places) == 8, "two steps ahead of the weights, and not a prompt more"
    assert len(cluster.begun) == 12
    cluster.version = 1
    feed.publish(1)
    assert len(feed.places) == 12
    cluster.ended = True


def test_without_lag_nothing_is_begun_before_the_weights_are_there():
    cfg = settings(max_lag=0)
    cluster = Cluster(pause=0.0)
    feed = feed_of(cfg, cluster)
    (harvest,) = train(cfg, cluster, feed, last=1)
    begun = len(cluster.begun)
    feed.take(2)
    time.sleep(0.03)
    assert begun == 8 and len(cluster.begun) == 8 and not feed.places and harvest.lags == [0] * 4
    cluster.ended = True


def test_async_without_lag_begins_the_same_units_as_sync():
    units = []
    for mode in ("sync", "async"):
        cfg = settings(mode=mode, max_lag=0, steps=6, algo__groups="refill")
        cluster = Cluster(seed=len(units), fate=some_fail, workers=3 + len(units))
        harvests = train(cfg, cluster, feed_of(cfg, cluster))
        units.append((cluster.begun, [h.record for h in harvests], [h.metrics["reward/mean"] for h in harvests]))
        cluster.ended = True
    assert units[0] == units[1]


def test_nothing_is_begun_that_no_step_would_take():
    cfg = settings(max_lag=2, steps=3)
    cluster = Cluster()
    feed = feed_of(cfg, cluster)
    harvests = train(cfg, cluster, feed)
    cluster.ended = True
    assert len(cluster.begun) == 12 and fates(harvests) == list(range(12)) and feed.state()["pending"] == []


def test_a_late_group_is_begun_anew_whole_and_not_for_ever():
    """With over-sampling a synchronous step goes without the slowest; what was cut comes back, and is waited for in the end."""
    cfg = settings(mode="sync", rollout__oversample=1.5, steps=8, algo__groups="keep")
    cluster = Cluster(unit=1, workers=6, pause=0.004)
    feed = feed_of(cfg, cluster)
    harvests = train(cfg, cluster, feed)
    cluster.ended = True
    seen = fates(harvests)
    assert len(seen) == 32 and len(set(seen)) == 32 and all(len(h.groups) == 4 for h in harvests)
    assert sum(h.metrics["cluster/groups_begun_anew"] for h in harvests) > 0 and len(cluster.begun) > 32
    assert max(seen) < 32 + 4, "the ones that were cut did not wait for ever"


def test_a_step_continues_from_its_state_with_the_prompts_that_had_no_fate():
    cfg = settings(max_lag=2, steps=20)
    cluster = Cluster(fate=some_fail)
    feed = feed_of(cfg, cluster)
    first = train(cfg, cluster, feed, last=7)
    state = feed.state()
    cluster.ended = True
    other = Cluster(seed=5, fate=some_fail)
    resumed = feed_of(cfg, other)
    assert resumed.restore(state, 7) == 0
    second = train(cfg, other, resumed, first=8)
    other.ended = True
    seen = fates(first + second)
    assert len(seen) == len(set(seen)) and sorted({*seen, *resumed.state()["pending"]}) == list(range(resumed.cursor.index))


def test_going_back_drops_what_is_under_way_and_late_answers_change_nothing():
    cfg = settings(max_lag=1, steps=20)
    cluster = Cluster(pause=0.02)
    feed = feed_of(cfg, cluster)
    past = train(cfg, cluster, feed, last=4)
    state = feed.state()
    dropped = train(cfg, cluster, feed, first=5, last=6)
    assert feed.restore(state, 4) > 0 and feed.step == 5 and cluster.cancelled
    again = train(cfg, cluster, feed, first=5)
    cluster.ended = True
    seen = fates(past + again)
    assert len(seen) == len(set(seen)) and fates(dropped)[0] in seen


def test_a_group_that_cannot_be_sampled_ends_the_wait_with_its_cause():
    cfg = settings()
    cluster = Cluster()
    cluster.group = lambda prompt, samples, version: RolloutFailed(f"{prompt.uid} failed 5 times")
    feed = feed_of(cfg, cluster)
    with pytest.raises(RolloutFailed, match="failed 5 times"):
        train(cfg, cluster, feed)
    cluster.ended = True


def test_an_error_in_a_callback_is_not_swallowed():
    cfg = settings()
    cluster = Cluster(fate=lambda index: ["not a number"])
    with pytest.raises((ValueError, TypeError)):
        train(cfg, cluster, feed_of(cfg, cluster))
    cluster.ended = True


def test_a_wait_ends_when_the_run_is_asked_to_end(monkeypatch):
    cfg = settings()
    cluster = Cluster(pause=30.0)
    feed = feed_of(cfg, cluster)
    feed.publish(0)
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted("SIGTERM asked the run to end")

    monkeypatch.setattr(interruption, "check", check)
    with pytest.raises(Interrupted):
        feed.take(1)
    assert sorted(feed.state()["pending"]) == list(range(8)), "nothing of the step is lost"
    cluster.ended = True


def test_over_sampling_counts_groups_not_floats():
    cluster = Cluster()
    cluster.ended = True
    capacities = [
        feed_of(settings(algo__prompts_per_step=10, rollout__oversample=o), cluster).capacity for o in (1.0, 1.1, 1.25)
    ]
    assert capacities == [10, 11, 13]


def test_the_line_about_a_wait_is_said_only_while_something_is_awaited(monkeypatch):
    monkeypatch.setattr(feed_module, "EVERY_S", 0.0)
    cfg = settings(mode="sync", steps=3)
    cluster = Cluster(pause=0.005)
    harvests = train(cfg, cluster, feed_of(cfg, cluster))
    cluster.ended = True
    assert fates(harvests) == list(range(12)), "also when the last group is there by the time that it is due"


def test_whoever_leaves_ends_what_is_under_way_and_keeps_it_for_the_next_start():
    cfg = settings(max_lag=1)
    cluster = Cluster(pause=30.0)
    feed = feed_of(cfg, cluster)
    feed.publish(0)
    before = feed.state()
    feed.abandon()
    assert len(cluster.cancelled) == 4 and feed.state() == before and before["pending"] == list(range(8))
    cluster.ended = True


def test_time_is_counted_once():
    cfg = settings(max_lag=0, steps=2)
    cluster = Cluster(pause=0.02)
    started = time.perf_counter()
    harvests = train(cfg, cluster, feed_of(cfg, cluster))
    total = time.perf_counter() - started
    cluster.ended = True
    assert 0 < sum(h.metrics["perf/rollout_s"] + h.metrics["perf/verify_s"] for h in harvests) <= total
    assert 0 < sum(h.metrics["perf/wait_s"] for h in harvests) <= total
