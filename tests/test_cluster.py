"""Named waits, placement, and the actor pool on a real Ray."""

import logging
import os
import time

import pytest

from rlpipe.actor_pool import ActorPool, Call, Failure
from rlpipe.cluster import Role, ledger, place, preflight, wait
from rlpipe.errors import ClusterError, ConfigError, WaitTimeout, WeightMismatch, WorkerLost


class Worker:
    """Remembers whether it was prepared; fails as told."""

    def __init__(self, index: int):
        self.index, self.prepared = index, False

    def pid(self) -> int:
        return os.getpid()

    def prepare(self) -> None:
        self.prepared = True

    def double(self, value: int, pause: float = 0.0) -> int:
        time.sleep(pause)
        return 2 * value

    def was_prepared(self) -> bool:
        return self.prepared

    def die_once(self, marker: str) -> tuple[int, bool]:
        if not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), 9)
        return self.index, self.prepared

    def count(self, until: int, marker: str = ""):
        for number in range(until):
            if marker and number == 2 and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), 9)
            yield number

    def hang(self) -> None:
        time.sleep(600)

    def refuse(self, index: int) -> int:
        if self.index == index:
            raise WeightMismatch(f"worker {index} will not")
        return self.index

    def fail(self) -> None:
        raise ConfigError("this call is wrong")


def make_pool(size: int = 2, retries: int = 2) -> ActorPool:
    import ray

    def prepare(actor):
        wait([actor.prepare.remote()], what="preparing", timeout_s=30)

    actor = ray.remote(Worker).options(num_cpus=0.1)
    return ActorPool(lambda i: actor.remote(i), size, name="test", retries=retries, prepare=prepare, start_timeout_s=60)


@pytest.fixture
def pool(ray_session):
    made = make_pool()
    yield made
    made.close()


def test_results_come_in_order_exactly_once(pool):
    calls = [Call("double", (i,), {"pause": 0.02 * (i % 3)}, label=f"unit {i}") for i in range(20)]
    assert pool.run(calls, timeout_s=20, what="doubling") == [2 * i for i in range(20)]
    streamed = list(pool.stream(calls, timeout_s=20, what="doubling"))
    assert sorted(streamed) == [(i, 2 * i) for i in range(20)]
    assert pool.run([], timeout_s=1, what="nothing") == []


def test_generators_give_their_parts_as_they_come(pool, tmp_path):
    calls = [Call("count", (i + 1,), label=f"unit {i}") for i in range(4)]
    streamed = list(pool.stream(calls, timeout_s=20, what="counting"))
    for i in range(4):
        assert [part for unit, part in streamed if unit == i] == [*range(i + 1), None]
    dying = [Call("count", (4, str(tmp_path / "m")), label="fatal"), Call("count", (2,), label="other")]
    parts = list(pool.stream(dying, timeout_s=60, what="counting"))
    again = [part for unit, part in parts if unit == 0]
    assert again in ([0, 1, 0, 1, 2, 3, None], [0, 0, 1, 2, 3, None], [0, 1, 2, 3, None]), "all of them again, elsewhere"
    assert [part for unit, part in parts if unit == 1] == [0, 1, None] and pool.restarts == 1


def test_a_dead_worker_is_replaced_prepared_and_its_unit_done_elsewhere(pool, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "rlpipe"):
        result = pool.run([Call("die_once", (str(tmp_path / "m"),), label="fatal")], timeout_s=60, what="dying")
    assert isinstance(result[0], tuple) and pool.restarts == 1 and pool.retried == 1
    assert "fatal" in caplog.text and "replaced" in caplog.text
    prepared = [wait([slot.actor.was_prepared.remote()], what="asking", timeout_s=30)[0] for slot in pool.slots]
    assert sorted(prepared) == [False, True]


def test_a_unit_that_hangs_fails_in_the_end_and_the_pool_lives_on(pool):
    results = pool.run([Call("hang", label="endless"), Call("double", (4,), label="fine")], timeout_s=1.0, what="hanging")
    assert isinstance(results[0], Failure) and results[1] == 8
    assert len(results[0].attempts) == 3 and "deadline" in str(results[0]) and pool.timeouts == 3
    assert pool.run([Call("double", (1,))], timeout_s=20, what="after") == [2]


def test_errors_keep_their_type_and_are_tried_elsewhere(pool):
    assert pool.run([Call("refuse", (0,), label="picky")], timeout_s=20, what="refusing") == [1]
    failure = pool.run([Call("fail", label="wrong")], timeout_s=20, what="failing")[0]
    assert isinstance(failure, Failure) and isinstance(failure.cause, ConfigError) and "this call is wrong" in str(failure)
    assert pool.restarts == 0


def test_broadcast_reaches_every_worker_dead_ones_included(pool):
    victim = wait([pool.slots[1].actor.pid.remote()], what="pid", timeout_s=20)[0]
    os.kill(victim, 9)
    time.sleep(0.5)
    assert pool.broadcast("double", 5, timeout_s=60, what="telling all") == [10, 10]
    assert pool.restarts == 1


def test_waits_have_names_and_deadlines(ray_session, caplog):
    import ray

    @ray.remote(num_cpus=0.1)
    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    with caplog.at_level(logging.INFO, "rlpipe"):
        assert wait([sleep.remote(0.0), sleep.remote(1.2)], what="two naps", timeout_s=60, every_s=0.3) == [0.0, 1.2]
    assert "waiting for two naps: 1/2" in caplog.text
    with pytest.raises(WaitTimeout, match="a long nap: 0/1"):
        wait([sleep.remote(30)], what="a long nap", timeout_s=0.5)


def test_a_dead_actor_ends_a_wait_at_once(ray_session):
    import ray

    actor = ray.remote(Worker).options(num_cpus=0.1).remote(0)
    pid = wait([actor.pid.remote()], what="pid", timeout_s=60)[0]
    references = [actor.hang.remote()]
    os.kill(pid, 9)
    with pytest.raises(WorkerLost, match="hanging"):
        wait(references, what="hanging", timeout_s=60, every_s=0.5)


def test_what_cannot_be_placed_is_refused_with_the_arithmetic(ray_session):
    roles = [Role("rollout", 3, 0.5, memory_gb=1.5), Role("learner", 2, 1.0, gpus=4)]
    with pytest.raises(ClusterError, match=r"needs 8 GPUs and the cluster has 0(?s:.*)learner"):
        preflight(roles)
    table = ledger(roles, {"CPU": 2.0, "memory": 8 * 2**30})
    assert "4.5 GB" in table and "3.50" in table and "8.0 GB" in table
    placement = place([Role("rollout", 2, 0.5)], 60)
    assert placement.options("rollout", 1)["num_cpus"] == 0.5
    placement.remove()
