"""The actor pool with actors that are threads: what happens when they hang, die again and again, or are asked for a word."""

import itertools
import threading
import time
from concurrent import futures

import pytest

from rlpipe import actor_dispatch, actor_pool
from rlpipe.actor_pool import ActorPool, Call, Failure
from rlpipe.actor_slot import Preparation
from rlpipe.config import RolloutConfig
from rlpipe.errors import WaitTimeout, WeightMismatch, WorkerLost
from rlpipe.models.weights import Layout
from rlpipe.rollout.pool import RolloutPool
from rlpipe.transport.update import WeightUpdate


class Actor:
    """Calls without a concurrency group run one after the other, those with one beside them. `kill` ends it in the middle."""

    def __init__(self, worker):
        self.worker, self.given, self.dead = worker, [], False
        self.alone, self.beside = futures.ThreadPoolExecutor(1), futures.ThreadPoolExecutor(4)

    def __getattr__(self, name):
        return Method(self, name, self.alone)

    def kill(self):
        self.dead = True
        for future in self.given:
            if not future.done():
                future.set_exception(WorkerLost("it was killed"))


class Method:
    def __init__(self, actor, name, runner):
        self.actor, self.name, self.runner = actor, name, runner

    def options(self, concurrency_group="", num_returns=1):
        return Method(self.actor, self.name, self.actor.beside if concurrency_group else self.runner)

    def remote(self, *args, **kwargs):
        future = futures.Future()
        self.actor.given.append(future)

        def run():
            try:
                result, error = getattr(self.actor.worker, self.name)(*args, **kwargs), None
            except Exception as raised:
                result, error = None, raised
            if not future.done():
                future.set_exception(error) if error else future.set_result(result)

        future.set_exception(WorkerLost("it is dead")) if self.actor.dead else self.runner.submit(run)
        return future


class Worker:
    def __init__(self, index):
        self.index, self.asked, self.asleep = index, 0, False
        self.busy, self.go_on, self.hangs, self.over = (threading.Event() for _ in range(4))

    def pid(self):
        return self.index

    def usage(self):
        self.asked += 1
        return self.index

    def work(self):
        self.busy.set()
        self.go_on.wait(20)
        return self.index

    def load_weights(self, update):
        self.over.wait(20 if self.hangs.is_set() else 0)
        self.asleep = False
        return update.version, update.checksum

    def sleep(self):
        self.asleep = True

    def sample(self):
        if self.asleep:
            raise WeightMismatch("no weights")
        return self.index

    def token_texts(self, responses):
        if self.hangs.is_set():
            raise WorkerLost("not now")
        return [[str(self.index)] for _ in responses]


def wait(references, *, what, timeout_s):
    try:
        return [reference.result(timeout_s) for reference in references]
    except futures.TimeoutError:
        raise WaitTimeout(what) from None


class Made(list):
    """Actors; and the pools that made them, to be closed before Ray is itself again."""

    def __init__(self):
        super().__init__()
        self.pools = []


@pytest.fixture
def threads(monkeypatch):
    """Actors in threads instead of Ray's: the list of all that were made."""
    import ray

    def finished(references, timeout_s, every=False):
        return list(futures.wait(list(references), timeout_s, futures.FIRST_COMPLETED).done)

    monkeypatch.setattr(actor_dispatch, "finished", finished)
    monkeypatch.setattr(actor_dispatch, "fetch", lambda reference, what: reference.result())
    monkeypatch.setattr(actor_dispatch.Dispatcher, "_next_part", lambda self, slot: (slot.reference.result(), False))
    monkeypatch.setattr(actor_dispatch, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(actor_pool, "wait", wait)
    monkeypatch.setattr(ray, "kill", lambda actor: actor.kill())
    made = Made()
    yield made
    for actor in made:
        actor.worker.go_on.set()
        actor.worker.over.set()
    for pool in made.pools:
        pool.close()
    for actor in made:
        actor.alone.shutdown(wait=False)
        actor.beside.shutdown(wait=False)


def pool_of(made, size, worker=Worker, group="control", **settings):
    def make(index):
        made.append(Actor(worker(index)))
        return made[-1]

    made.pools.append(ActorPool(make, size, name="test", retries=2, group=group, start_timeout_s=5.0, **settings))
    return made.pools[-1]


def test_a_worker_that_does_not_answer_is_left_out_of_the_replies(threads):
    pool = pool_of(threads, 3)
    threads[1].worker.usage = lambda: threads[1].worker.go_on.wait(20)
    assert pool.each("usage", timeout_s=0.3, what="memory") == {0: 0, 2: 2}
    threads[2].kill()
    assert pool.each("usage", timeout_s=0.3, what="memory") == {0: 0}


def test_actors_that_do_one_thing_at_a_time_are_not_asked_in_the_middle_of_a_unit(threads):
    pool = pool_of(threads, 2, group="")
    pool.submit(Call("work"), lambda *_: None, timeout_s=20, what="")
    busy = next(actor.worker for actor in itertools.cycle(threads) if actor.worker.busy.wait(0.01))
    assert pool.each("usage", timeout_s=5, what="memory") == {1 - busy.index: 1 - busy.index}


def test_any_of_the_workers_answers_beside_its_unit(threads):
    pool = pool_of(threads, 2)
    for _ in range(2):
        pool.submit(Call("work"), lambda *_: None, timeout_s=20, what="")
    assert all(actor.worker.busy.wait(10) for actor in threads)
    assert pool.any("usage", timeout_s=5, what="memory") == 0
    threads[0].worker.usage = lambda: threads[0].worker.go_on.wait(20)
    assert pool.any("usage", timeout_s=0.2, what="memory") == 1
    for actor in threads:
        actor.worker.usage = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        pool.any("usage", timeout_s=0.2, what="memory")


def test_one_bad_worker_does_not_end_the_pool_while_another_can_work(threads):
    class Dying(Worker):
        def pid(self):
            if self.index == 1 and len(threads) > 2:
                raise WorkerLost("a bad machine")
            return self.index

    pool = pool_of(threads, 2, Dying)
    pool.prepare(Preparation("usage", (), "nothing", 5.0))
    pool.wait_prepared(5.0)
    threads[1].kill()
    pool.submit(Call("work"), lambda *_: None, timeout_s=20, what="")
    pool.submit(Call("work"), lambda *_: None, timeout_s=20, what="")
    limit = actor_dispatch.START_ATTEMPTS * 2
    while pool._in_a_row <= limit + 2 and pool.broken is None:
        time.sleep(0.01)
    assert pool.broken is None
    for actor in threads:
        actor.worker.go_on.set()
    assert pool.run([Call("work")] * 3, timeout_s=20, what="after") == [0, 0, 0]


def test_the_pause_between_two_starts_grows_and_has_an_end():
    assert [actor_dispatch.pause_before(starts) for starts in (1, 2, 3, 4, 7, 5000)] == [0, 1, 2, 4, 30, 30]


def test_what_is_cancelled_between_two_attempts_is_not_tried_again(threads):
    pool, told = pool_of(threads, 1), []
    pool.submit(Call("work"), lambda *_: None, timeout_s=20, what="")
    assert threads[0].worker.busy.wait(10)
    unit = pool.submit(Call("usage"), lambda *result: told.append(result), timeout_s=20, what="")
    unit.cancelled = True  # it came back to the queue in the moment in which somebody gave it up
    last = threading.Event()
    pool.submit(Call("usage"), lambda *_: last.set(), timeout_s=20, what="")
    threads[0].worker.go_on.set()
    assert last.wait(10) and not told and threads[0].worker.asked == 1


def rollouts_of(pool, **settings) -> RolloutPool:
    made = object.__new__(RolloutPool)
    made.cfg, made.pool, made.at_once, made.version = RolloutConfig(**settings), pool, False, -1
    return made


def test_a_worker_that_hangs_over_its_weights_is_replaced_and_the_wait_goes_on(threads):
    pool = pool_of(threads, 2)
    rollouts = rollouts_of(pool, timeout_s=0.3)
    threads[0].worker.hangs.set()
    for _ in range(2):
        pool.submit(Call("work"), lambda *_: None, timeout_s=20, what="")
    assert all(actor.worker.busy.wait(10) for actor in threads)
    for actor in threads[:2]:  # their turn comes a little later than the wait for them begins
        threading.Timer(0.2, actor.worker.go_on.set).start()
    rollouts.set_weights(WeightUpdate(1, Layout(), checksum="c"), wait=True)
    assert rollouts.version == 1 and pool.restarts == 1 and pool.timeouts == 1


def test_units_that_wait_while_the_workers_sleep_are_done_when_they_wake(threads):
    pool, done = pool_of(threads, 1), threading.Event()
    rollouts = rollouts_of(pool)
    rollouts.set_weights(WeightUpdate(1, Layout(), checksum="c"), wait=True)
    pool.submit(Call("work"), lambda *_: None, timeout_s=20, what="")
    assert threads[0].worker.busy.wait(10)
    pool.submit(Call("sample"), lambda result, more: done.set(), timeout_s=20, what="")
    threading.Timer(0.05, threads[0].worker.go_on.set).start()
    rollouts.sleep()
    assert not done.wait(0.3) and pool.retried == 0 and rollouts.units_waiting == 1 and rollouts.token_texts([1]) == [["0"]]
    rollouts.set_weights(WeightUpdate(1, Layout(), checksum="c"), wait=True)
    assert done.wait(10) and pool.retried == 0
    pool.run([Call("work")], timeout_s=20, what="after")


def test_tokens_are_spelled_out_beside_the_units(threads):
    pool = pool_of(threads, 2)
    rollouts = rollouts_of(pool)
    for _ in range(2):
        pool.submit(Call("work"), lambda *_: None, timeout_s=20, what="")
    assert all(actor.worker.busy.wait(10) for actor in threads)
    assert rollouts.token_texts([1, 2]) == [["0"], ["0"]]
    threads[0].worker.hangs.set()
    assert rollouts.token_texts([1]) == [["1"]]
    for actor in threads:
        actor.worker.hangs.set()
        actor.worker.go_on.set()
    assert rollouts.token_texts([1]) in ([["0"]], [["1"]]) and pool.restarts, "nobody could: it became a unit, and was retried"


def test_a_pool_without_anybody_who_can_work_gives_up(threads):
    class Dead(Worker):
        def load_weights(self, update):
            raise WorkerLost("no weights for me")

    pool = pool_of(threads, 1, Dead)
    pool.prepare(Preparation("load_weights", (WeightUpdate(1, Layout()),), "weights", 5.0))
    (failure,) = pool.run([Call("usage")], timeout_s=20, what="hoping")
    assert isinstance(failure, Failure) and "without finishing anything" in str(failure)
