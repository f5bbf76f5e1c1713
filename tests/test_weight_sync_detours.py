"""Weights and trouble on their way: whatever a shortcut meets, the object store has the last word, and its newest version."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rlpipe import weight_sync
from rlpipe.config import RolloutConfig, RunConfig
from rlpipe.errors import ClusterError, WaitTimeout, WorkerLost
from rlpipe.learner.exporting import Receipt
from rlpipe.models.weights import Layout, combined
from rlpipe.transport.update import Facts
from rlpipe.weight_sync import WeightSync

LAYOUT = Layout((), (64, 64))
ALL_WELL = Receipt((1, 2), "", 0, 0)
HERE = Facts("here", "", "", -1)


class Learner:
    """Its export through the store is told from a worker's copy by the references."""

    def __init__(self):
        self.waited_for, self.put = 0, 0

    def weights_facts(self):
        return HERE, False

    def weights_plan(self, contents):
        return LAYOUT, {}

    def put_weights(self, contents, buckets):
        self.put += 1
        return ("of the learner",) * buckets, ALL_WELL

    def prepare_weights(self, order):
        return SimpleNamespace()

    def send_weights(self, contents):
        return []

    def sent_weights(self, pending):
        self.waited_for += 1
        return ALL_WELL


class Rollouts:
    """Two workers. given: what the pool was told, in order; trouble: raised by the method of that name."""

    def __init__(self):
        self.given, self.trouble, self.puts, self.held = [], {}, 0, -1

    def _meet(self, method):
        if method in self.trouble:
            raise self.trouble[method]

    def set_weights(self, update, *, wait):
        self.given.append((update, wait))

    def each(self, method, *args, timeout_s, what):
        self._meet(method)
        if method == "weights_facts":
            return dict.fromkeys((0, 1), replace(HERE, version=self.held))
        self.held = args[0].version
        return dict.fromkeys((0, 1), (self.held, combined(ALL_WELL.digests)))

    def put_weights(self, worker, version, layout):
        self._meet("put_weights")
        self.puts += 1
        return [f"of worker {worker}", f"of worker {worker}", f"done {worker}"]


@pytest.fixture
def sync(monkeypatch):
    found = WeightSync(RunConfig(rollout=RolloutConfig(transport="shared")), Learner(), Rollouts())
    monkeypatch.setattr(weight_sync, "wait", lambda references, **about: [2])
    return found


TROUBLES = {
    "a worker that hangs": ("weights_facts", WaitTimeout("1 of 2 answered")),
    "no memory left": ("load_weights", RuntimeError("out of memory")),
    "a worker that dies afterwards": ("put_weights", WorkerLost("rollout worker 0 is gone")),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_of_any_kind_costs_a_detour_and_not_the_run(sync, trouble):
    method, error = TROUBLES[trouble]
    sync.rollouts.trouble[method] = error
    assert sync.publish(1)["perf/sync_fallbacks"] == 1
    ((update, waits),) = sync.rollouts.given
    assert update.carrier.buckets == ("of the learner",) * 2 and waits
    assert sync.learner.waited_for == (method != "weights_facts"), "ranks that were under way are waited for"
    sync.rollouts.trouble.clear()
    assert sync.publish(2)["perf/sync_fallbacks"] == 0
    assert sync.rollouts.given[-1][0].carrier.buckets == ("of worker 0",) * 2


def test_the_first_worker_fails_and_the_pool_ends_with_what_the_second_put(sync, monkeypatch):
    """Also when it fails before the pool has been told anything."""
    over = threading.Event()

    def wait(references, **about):
        if references == ["done 0"]:
            raise WorkerLost("rollout worker 0 died")
        over.set()
        return [2]

    monkeypatch.setattr(weight_sync, "wait", wait)
    told = sync.rollouts.set_weights
    sync.rollouts.set_weights = lambda update, *, wait: (time.sleep(0.05), told(update, wait=wait))
    sync.publish(1)
    assert over.wait(10)
    assert [update.carrier.buckets[0] for update, _ in sync.rollouts.given] == ["of worker 0", "of worker 1"]


@pytest.mark.parametrize("version", (1, 2))
def test_weights_of_a_past_that_was_left_never_come_back(sync, monkeypatch, version):
    """version 1: the learner went back to its checkpoint, and other weights have the number."""
    back, failed = threading.Event(), threading.Event()

    def wait(references, **about):
        if not failed.is_set():
            failed.set()
            assert back.wait(10)
            raise ClusterError("it holds 1 of 2 buckets")
        return [2]

    monkeypatch.setattr(weight_sync, "wait", wait)
    sync.publish(1)
    assert failed.wait(10)
    watch = next(thread for thread in threading.enumerate() if thread.name == "weights in the store")
    sync.forget()
    sync.publish(version)
    back.set()
    watch.join(10)
    assert not watch.is_alive() and len(sync.rollouts.given) == 2, "the pool was not told of the first any more"


def test_workers_that_sleep_are_left_asleep(sync, monkeypatch):
    """Their turn is over before all is in the store: whoever has the GPU now needs it."""
    asleep = threading.Event()

    def wait(references, **about):
        assert asleep.wait(10)
        raise ClusterError("it holds 1 of 2 buckets")

    monkeypatch.setattr(weight_sync, "wait", wait)
    sync.publish(1)
    watch = next(thread for thread in threading.enumerate() if thread.name == "weights in the store")
    sync.rollouts.held = -1
    asleep.set()
    watch.join(10)
    assert not watch.is_alive() and len(sync.rollouts.given) == 1
