"""The actor pool on a real Ray: nothing is lost, dead workers come back prepared, and nobody waits for ever."""

import logging
import os
import queue
import threading
import time

import pytest

from rlpipe import actor_dispatch
from rlpipe.actor_pool import ActorPool, Call, Failure
from rlpipe.actor_slot import Preparation
from rlpipe.cluster import wait
from rlpipe.errors import ConfigError, WaitTimeout, WeightMismatch, WorkerLost

CONTROL = "control"


class Worker:
    """Remembers what it was prepared with; fails as told."""

    def __init__(self, index: int, marker: str = ""):
        if marker and os.path.exists(marker):
            os.kill(os.getpid(), 9)
        self.index, self.prepared, self.stopped = index, [], threading.Event()

    def pid(self) -> int:
        return os.getpid()

    def prepare(self, version: int, pause: float = 0.0) -> int:
        time.sleep(pause)
        self.prepared.append(version)
        return version

    def double(self, value: int, pause: float = 0.0) -> int:
        time.sleep(pause)
        return 2 * value

    def was_prepared(self) -> list[int]:
        return self.prepared

    def die_once(self, marker: str) -> tuple[int, list[int]]:
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

    def until_stopped(self):
        yield "begun"
        self.stopped.wait(60)
        yield "stopped"

    def stop(self, unit: str) -> None:
        self.stopped.set()

    def hang(self) -> None:
        time.sleep(600)

    def refuse(self, index: int) -> int:
        if self.index == index:
            raise WeightMismatch(f"worker {index} will not")
        return self.index

    def fail(self) -> None:
        raise ConfigError("this call is wrong")


def make_pool(size: int = 2, retries: int = 2, marker: str = "", **settings) -> ActorPool:
    import ray

    actor = ray.remote(concurrency_groups={CONTROL: 2})(Worker).options(num_cpus=0.1)
    settings = {"start_timeout_s": 60.0} | settings
    return ActorPool(lambda i: actor.remote(i, marker), size, name="test", retries=retries, group=CONTROL, **settings)


@pytest.fixture
def pool(ray_session):
    made = make_pool()
    yield made
    made.close()


def prepared(pool: ActorPool) -> dict[int, list[int]]:
    return pool.each("was_prepared", timeout_s=30, what="asking")


def test_results_come_in_order_exactly_once(pool):
    calls = [Call("double", (i,), {"pause": 0.02 * (i % 3)}, label=f"unit {i}") for i in range(20)]
    assert pool.run(calls, timeout_s=20, what="doubling") == [2 * i for i in range(20)]
    streamed = list(pool.stream(calls, timeout_s=20, what="doubling"))
    assert sorted(streamed) == [(i, 2 * i) for i in range(20)]
    assert pool.run([], timeout_s=1, what="nothing") == []
    assert pool.busy_s > 0


def test_many_threads_may_ask_at_once(pool):
    found = {}

    def ask(thread: int) -> None:
        calls = [Call("double", (100 * thread + i,), label=f"{thread}/{i}") for i in range(15)]
        found[thread] = pool.run(calls, timeout_s=30, what=f"thread {thread}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {t: [2 * (100 * t + i) for i in range(15)] for t in range(4)}


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


def test_a_dead_worker_is_replaced_and_prepared_while_its_unit_is_done_elsewhere(pool, tmp_path, caplog):
    replies = []
    pool.prepare(Preparation("prepare", (7,), "version 7", 30, check=replies.append))
    pool.wait_prepared(30)
    with caplog.at_level(logging.INFO, "rlpipe"):
        result = pool.run([Call("die_once", (str(tmp_path / "m"),), label="fatal")], timeout_s=60, what="dying")
        assert result[0][1] == [7] and pool.restarts == 1 and pool.retried == 1
        pool.run([Call("double", (1,), {"pause": 2.0}, label=f"long {i}") for i in range(4)], timeout_s=30, what="longer work")
    assert "fatal" in caplog.text and "is replaced" in caplog.text and "is back" in caplog.text
    assert sorted(prepared(pool).values()) == [[7], [7]]
    assert replies == [7, 7, 7]


def test_a_unit_that_hangs_fails_in_the_end_and_the_pool_lives_on(pool):
    results = pool.run([Call("hang", label="endless"), Call("double", (4,), label="fine")], timeout_s=1.0, what="hanging")
    assert isinstance(results[0], Failure) and results[1] == 8
    assert len(results[0].attempts) == 3 and "deadline" in str(results[0]) and pool.timeouts == 3
    assert pool.run([Call("double", (1,))], timeout_s=20, what="after") == [2]


def test_errors_keep_their_type_and_are_tried_elsewhere(pool):
    assert pool.run([Call("refuse", (0,), label="picky")], timeout_s=20, what="refusing") == [1]
    failure = pool.run([Call("fail", label="wrong")], timeout_s=20, what="failing")[0]
    assert isinstance(failure.cause, ConfigError) and failure.attempts[0].endswith("this call is wrong")
    assert pool.restarts == 0


def test_no_work_before_the_preparation_and_a_newer_one_replaces_it(pool):
    for version in (1, 2, 3):
        pool.prepare(Preparation("prepare", (version, 0.05), f"version {version}", 30))
    assert pool.run([Call("was_prepared", label=str(i)) for i in range(2)], timeout_s=30, what="asking")[0][-1] == 3
    pool.wait_prepared(30)
    assert {done[-1] for done in prepared(pool).values()} == {3}


def test_a_preparation_waits_for_the_unit_unless_it_need_not(pool):
    arrived = queue.SimpleQueue()
    for number in range(2):
        pool.submit(Call("until_stopped", label=str(number)), lambda *part: arrived.put(part), timeout_s=60, what="endless")
    assert [arrived.get(timeout=20) for _ in range(2)] == [("begun", True)] * 2
    pool.prepare(Preparation("prepare", (1,), "version 1", 30))
    with pytest.raises(WaitTimeout, match="version 1"):
        pool.wait_prepared(0.5)
    assert list(prepared(pool).values()) == [[], []]
    pool.prepare(Preparation("prepare", (2,), "version 2", 30, at_once=True))
    pool.wait_prepared(20)
    assert list(prepared(pool).values()) == [[2], [2]] and pool.idle == 0
    pool.each("stop", "", timeout_s=20, what="stopping")
    assert [arrived.get(timeout=20) for _ in range(4)].count((None, False)) == 2


def test_a_preparation_that_is_not_what_was_wanted_costs_the_worker_its_place(pool):
    calls = []

    def check(reply):
        calls.append(reply)
        if len(calls) == 1:
            raise WeightMismatch("other bytes")

    pool.prepare(Preparation("prepare", (1,), "version 1", 30, check=check))
    pool.wait_prepared(30)
    assert pool.run([Call("double", (3,))], timeout_s=30, what="after") == [6]
    deadline = time.monotonic() + 30
    while pool.up < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pool.restarts == 1 and pool.up == 2


def test_what_is_cancelled_is_never_answered(pool):
    arrived, units = queue.SimpleQueue(), []
    for number in range(3):
        call = Call("until_stopped", label=str(number))
        units.append(pool.submit(call, lambda *part: arrived.put(part), timeout_s=60, what="endless"))
    assert [arrived.get(timeout=20)[0] for _ in range(2)] == ["begun"] * 2
    for unit in units:
        pool.cancel(unit, abort="stop")
    assert pool.run([Call("double", (i,)) for i in range(4)], timeout_s=20, what="after") == [0, 2, 4, 6]
    assert arrived.empty() and pool.retried == 0


def test_what_is_urgent_goes_first(ray_session):
    pool, order = make_pool(1), queue.SimpleQueue()
    for name, urgency in (("first", 1), ("later", 1), ("urgent", 0)):
        call = Call("double", (0,), {"pause": 0.5}, label=name)
        pool.submit(call, lambda *_, name=name: order.put(name), timeout_s=30, what="", urgency=urgency)
        while name == "first" and pool.idle:
            time.sleep(0.01)
    assert [order.get(timeout=20) for _ in range(3)] == ["first", "urgent", "later"]
    pool.close()


def test_workers_without_a_place_join_when_there_is_one(ray_session):
    free = {0}
    pool = make_pool(3, minimum=1, has_place=lambda index: index in free)
    assert pool.up == 1
    pool.prepare(Preparation("prepare", (5,), "version 5", 30))
    assert pool.run([Call("double", (i,)) for i in range(3)], timeout_s=30, what="alone") == [0, 2, 4]
    free |= {1, 2}
    deadline = time.monotonic() + 60
    while pool.up < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    pool.wait_prepared(30)
    assert prepared(pool) == {0: [5], 1: [5], 2: [5]} and pool.restarts == 0
    pool.close()


def test_spans_tell_who_did_what_when(ray_session):
    spans = []
    pool = make_pool(1, retries=0, spans=lambda *span: spans.append(span))
    before = time.time()
    pool.run([Call("double", (1,), {"pause": 0.2}, label="good"), Call("fail", label="bad")], timeout_s=30, what="both")
    pool.close()
    assert [(index, label, well) for index, label, _, _, well in spans] == [(0, "good", True), (0, "bad", False)]
    assert before <= spans[0][2] <= spans[0][3] - 0.2 <= time.time()


def test_workers_that_never_come_up_end_the_wait_with_the_cause(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(actor_dispatch, "LONGEST_PAUSE_S", 0.1)
    (tmp_path / "dead").touch()
    with pytest.raises(WorkerLost, match="started anew 4 times without finishing anything"):
        make_pool(1, marker=str(tmp_path / "dead"))


def test_a_pool_that_lost_everybody_fails_its_units(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(actor_dispatch, "LONGEST_PAUSE_S", 0.1)
    pool = make_pool(1, marker=str(tmp_path / "dead"))
    (tmp_path / "dead").touch()
    victim = wait([pool.slots[0].actor.pid.remote()], what="pid", timeout_s=20)[0]
    os.kill(victim, 9)
    (failure,) = pool.run([Call("double", (1,), label="hopeless")], timeout_s=60, what="hoping")
    assert isinstance(failure, Failure) and "without finishing anything" in str(failure)
    with pytest.raises(WorkerLost, match="without finishing"):
        pool.submit(Call("double", (1,)), print, timeout_s=1, what="more")
    pool.close()
