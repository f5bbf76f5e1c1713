"""Weights from real ranks to real workers, by every carrier, through deaths; one gather a bucket, at most two buckets."""

import os
import pathlib
import signal
import time

import pytest
import torch

from rlpipe.actor_pool import ActorPool
from rlpipe.bench.live_bytes import LiveBytes
from rlpipe.cluster import wait
from rlpipe.config import RolloutConfig, RunConfig
from rlpipe.learner.exporting import BASE, BROADCAST, SHARED, WHOLE, ExportingRank, ExportingRanks
from rlpipe.models.weights import Layout
from rlpipe.rollout.pool import CONTROL, CONTROL_CALLS, RolloutPool
from rlpipe.weight_sync import WeightSync

pytestmark = pytest.mark.timeout(600)
BUCKET = 8_000  # bytes: a dozen buckets of the tiny model
HERE = str(pathlib.Path(__file__).parent)
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": HERE}


class Rank(ExportingRank):
    """A learner rank that exports one model after the other."""

    def __init__(self, rank: int, world: int):
        torch.set_num_threads(1)
        self.rank, self.world = rank, world

    def address(self) -> str:
        from rlpipe.transport.meeting import serve

        return serve("127.0.0.1", 1.0)[1]

    def join(self, master: str) -> None:
        from rlpipe.learner.engine import join_process_group

        join_process_group(self.rank, self.world, master, 120.0)

    def build(self, stage: int, lora: int) -> None:
        from test_learner import learner_of

        from rlpipe.learner.exporting import Exporter

        self.learner = learner_of("block", self.world, stage, 200, False, lora=lora)
        self.exporter = Exporter(self.learner.engine, BUCKET)
        self.gathers = self.beside = 0
        gathered = self.learner.engine.gathered

        def counted(parameters):
            self.gathers += 1
            pages = self.exporter.pages
            self.beside += 0 if pages is None else int(torch.count_nonzero(pages.tensor))
            return gathered(parameters)

        self.learner.engine.gathered = counted

    def train(self) -> None:
        from test_learner import experience

        from rlpipe.learner.micro_batches import make_shards

        plan = experience("block")
        self.learner.train(make_shards(plan.samples, plan.updates, [], 200, self.world)[self.rank], 1)

    def whole(self) -> dict:
        """What a full export says, by name; empty but on rank 0."""
        return {name: tensor.clone() for name, tensor in self.learner.engine.state().items()}

    def counted_gathers(self) -> int:
        found, self.gathers = self.gathers, 0
        return found

    def peak_of_put(self, contents: str) -> tuple[int, int, int]:
        """(largest number of bytes of tensors that were alive at a time and made during a `put`, not counting the bucket
        itself; bytes of buckets that were there when a gather began; the receipt's number)."""
        self.beside = 0
        with LiveBytes() as live:
            for item in self.exporter.put(contents):
                last = item
        return live.peak, self.beside, last.peak_bytes


class Worker:
    """A rollout worker's part in it. trouble: 'dies' in the middle of the next update that is not from the store; 'no room' for
    what others may need."""

    def __init__(self, index: int):
        from test_learner import fresh
        from tiny_models import tiny

        from rlpipe.transport.update import Receiver

        torch.set_num_threads(1)
        self.model, self.weights, self.trouble = fresh(tiny("block", 1)[0]).lm, Receiver(), ""

    def pid(self) -> int:
        return os.getpid()

    def load_weights(self, update):
        from rlpipe.transport.store import Stored

        if self.trouble == "dies" and not isinstance(update.carrier, Stored):
            buckets = self.weights._buckets

            def troubled(*args):
                for place, bucket in enumerate(buckets(*args)):
                    if place == 3:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield bucket

            self.weights._buckets = troubled
        return self.weights.receive(update, self.model)

    def weights_facts(self):
        return self.weights.facts()

    def put_weights(self, version: int, layout: Layout):
        if self.trouble == "no room":
            raise OSError("no room in the test")
        yield from self.weights.put(version, layout, self.model)

    def make_trouble(self, trouble: str) -> None:
        self.trouble = trouble

    def state(self) -> tuple[int, dict]:
        return self.weights.version, {name: p.detach().clone() for name, p in self.model.named_parameters()}


class Ranks(ExportingRanks):
    def __init__(self, workers):
        self.workers = workers

    def _wait(self, references: list, what: str) -> list:
        return wait(references, what=what, timeout_s=120)

    def all(self, method: str, *args) -> list:
        return self._wait([getattr(worker, method).remote(*args) for worker in self.workers], f"{method} in the test")


class Pool(RolloutPool):
    """The real pool around the test's workers."""

    def __init__(self, cfg: RunConfig):
        import ray

        self.cfg, self.version, self.at_once = cfg.rollout, -1, False
        actor = ray.remote(concurrency_groups={CONTROL: CONTROL_CALLS})(Worker)
        options = {"num_cpus": 0.1, "runtime_env": {"env_vars": ENVIRONMENT}}
        self.pool = ActorPool(
            lambda index: actor.options(**options).remote(index), cfg.rollout.workers, name="rollout", retries=2, group=CONTROL
        )

    def states(self) -> dict[int, tuple[int, dict]]:
        return self.each("state", timeout_s=60, what="weights in the test")


@pytest.fixture(scope="module")
def ranks(ray_session):
    import ray

    actor = ray.remote(Rank).options(runtime_env={"env_vars": ENVIRONMENT}, num_cpus=0.1)
    workers = [actor.remote(rank, 2) for rank in range(2)]
    group = Ranks(workers)
    master = wait([workers[0].address.remote()], what="test rank 0", timeout_s=240)[0]
    group.all("join", master)
    yield group
    for worker in workers:
        ray.kill(worker)


@pytest.fixture(scope="module")
def pool(ray_session):
    cfg = config()
    found = Pool(cfg)
    yield found
    found.close()


def config(transport: str = "store", **more) -> RunConfig:
    return RunConfig(rollout=RolloutConfig(workers=2, transport=transport, timeout_s=120.0), **more)


def check(ranks: Ranks, pool: Pool, version: int) -> None:
    """Every worker holds the version, to the bit."""
    whole = ranks.all("whole")[0]
    states = pool.states()
    assert len(states) == 2
    for held, weights in states.values():
        assert held == version and weights.keys() == whole.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("stage, lora", ((1, 0), (3, 0), (1, 4), (3, 4)))
def test_every_worker_ends_with_every_version_by_every_carrier(ranks, pool, stage, lora):
    ranks.all("build", stage, lora)
    ranks.all("train")
    version = int(time.time() * 10) % 10**8
    sent = {}
    for transport in ("store", BROADCAST, SHARED, "auto"):
        sync = WeightSync(config(transport), ranks, pool)
        for _ in range(2):
            version += 1
            ranks.all("counted_gathers")
            metrics = sync.publish(version)
            gathers, others = ranks.all("counted_gathers")
            assert metrics["perf/sync_fallbacks"] == 0 and gathers == others
            if stage == 3:
                layouts = [sync._plans[contents][0] for contents in sync._plans]
                assert gathers in (len(layouts[-1].sizes), sum(len(layout.sizes) for layout in layouts))
            sent.setdefault(transport, []).append(metrics["perf/sync_mb"])
            check(ranks, pool, version)
            ranks.all("train")
        assert sync.groups == (transport == BROADCAST), "a process group serves version after version"
        sync.forget()
    first, later = sent["store"]
    assert later == sent[SHARED][1] and (later < first / 4 if lora else later == first), "adapters go alone after the base"


@pytest.mark.parametrize("stage", (1, 3))
def test_an_export_never_holds_more_than_two_buckets(ranks, stage):
    ranks.all("build", stage, 0)
    largest = ranks.weights_plan(WHOLE)[0].largest
    assert ranks.weights_plan(WHOLE)[0].nbytes > 8 * largest
    ranks.all("peak_of_put", WHOLE)  # makes the digest's table of weights, which stays
    (made, beside, said), (elsewhere, _, _) = ranks.all("peak_of_put", WHOLE)
    few = 2_000  # bytes: sums of a digest
    if stage == 3:
        assert made <= 2 * largest + few and beside == 0 and said == 2 * largest  # a gather's own two, or one and the bucket
        assert elsewhere <= 2 * largest
    else:
        assert max(made, elsewhere + largest) <= largest + few and said == largest  # the digest's products, beside the bucket


@pytest.mark.parametrize("transport", (BROADCAST, SHARED))
def test_a_worker_that_dies_in_the_middle_costs_a_detour(ranks, pool, transport):
    ranks.all("build", 3, 0)
    sync = WeightSync(config(transport), ranks, pool)
    assert sync.publish(1)["perf/sync_fallbacks"] == 0
    ranks.all("train")
    restarts = pool.pool.restarts
    wait([pool.pool.ask(1, "make_trouble", "dies")], what="trouble in the test", timeout_s=30)
    assert sync.publish(2)["perf/sync_fallbacks"] == 1
    until(lambda: pool.pool.up == 2 and pool.pool.restarts > restarts)
    pool.pool.wait_prepared(120)
    check(ranks, pool, 2)
    assert sync.publish(3)["perf/sync_fallbacks"] == 0
    check(ranks, pool, 3)
    assert sync.groups == (2 if transport == BROADCAST else 0), "the group is made anew"
    sync.forget()


def test_a_worker_that_starts_later_gets_the_version_from_the_store(ranks, pool):
    import ray

    ranks.all("build", 1, 4)
    sync = WeightSync(config(BROADCAST), ranks, pool)
    sync.publish(5)
    wait([pool.pool.ask(worker, "make_trouble", "no room") for worker in (0, 1)], what="trouble", timeout_s=30)
    ranks.all("train")
    assert sync.publish(6)["perf/sync_fallbacks"] == 0
    restarts = pool.pool.restarts
    ray.kill(pool.pool.slots[1].actor)
    wait([pool.pool.ask(0, "make_trouble", "")], what="an end to trouble", timeout_s=30)
    until(lambda: pool.pool.restarts > restarts and pool.pool.up == 2)
    pool.pool.wait_prepared(120)
    check(ranks, pool, 6)
    assert sync._base.layout == ranks.weights_plan(BASE)[0]
    sync.forget()


def until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
