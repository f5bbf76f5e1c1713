"""Machines that die, come late or are full, on a simulated Ray cluster of three: who loses a place, and who gets one.

The tests tell one story on one cluster, in this order. Their numbers of GPUs are Ray's bookkeeping: no GPU is needed.
"""

import logging
import threading
import time

import pytest

from rlpipe import cluster
from rlpipe.bundles import Role
from rlpipe.cluster import fetch, place, preflight, wait
from rlpipe.config import ClusterConfig
from rlpipe.errors import ClusterError, WaitTimeout, WorkerLost

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
QUICK = {  # a machine's death is noticed in about 2 s instead of 15
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3", "RAY_AUTH_MODE": "disabled",
}  # fmt: skip
ROLES = [
    Role("rollout", 3, 0.2, 1.0, at_once=1), Role("verifier", 2, 0.1, at_once=1), Role("learner", 2, 0.2, 1.0),
]  # fmt: skip


class Seated:
    """Says where it is."""

    def where(self) -> tuple[str, str]:
        import os

        import ray

        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


class Nodes:
    """A head without GPUs and two machines with two each; more on demand."""

    def __init__(self):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, **SMALL})
        self.machines = [self.add(2), self.add(2)]

    def add(self, gpus: int):
        return self.cluster.add_node(num_cpus=2, num_gpus=gpus, **SMALL)

    def kill(self, node_id: str) -> None:
        victim = next(machine for machine in self.machines if machine.node_id == node_id)
        self.machines.remove(victim)
        self.cluster.remove_node(victim, allow_graceful=False)


@pytest.fixture(scope="module")
def nodes():
    import ray

    shared = ray.is_initialized()
    cluster.disconnect()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUICK.items():
            patch.setenv(name, value)
        made = Nodes()
        cluster.connect(ClusterConfig(address=made.cluster.address), need_cpus=0, need_gpus=0)
        yield made
        cluster.disconnect()
        made.cluster.shutdown()
    if shared:  # the session's own, for whoever comes next
        cluster.connect(ClusterConfig(address="local"), need_cpus=8, need_gpus=0)


@pytest.fixture(scope="module")
def placement(nodes):
    made = place(ROLES, 60)
    yield made
    made.remove()


def seat(placement, role: str, index: int, **options):
    import ray

    return ray.remote(Seated).options(**placement.options(role, index) | options).remote()


def where(actor) -> tuple[str, str]:
    return wait([actor.where.remote()], what="an actor", timeout_s=60)[0]


def until(condition, what: str, timeout_s: float = 60.0) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, what
        time.sleep(0.1)
    return time.monotonic() - started


def test_what_no_arrangement_holds_is_refused_at_once(nodes):
    with pytest.raises(ClusterError, match=r"needs 8 GPUs and the cluster has 4(?s:.*)learner"):
        preflight([Role("learner", 8, 0.1, 1.0)])
    with pytest.raises(ClusterError, match="0.1 CPUs and 4 GPUs each, on one machine"):
        preflight([Role("rollout", 1, 0.1, 4.0)])
    with pytest.raises(ClusterError, match="of host memory"):
        preflight([Role("learner", 1, 0.1, memory_gb=10_000.0)])
    assert not cluster.autoscales()
    preflight(ROLES)  # what it starts with fits; the third rollout worker joins when it can


def test_a_growing_cluster_is_waited_for(nodes, monkeypatch, caplog):
    monkeypatch.setattr(cluster, "autoscales", lambda: True)
    with caplog.at_level(logging.INFO, "rlpipe"):
        preflight([Role("learner", 8, 0.1, 1.0)])
    assert "grows by itself" in caplog.text and "needs 8 GPUs" in caplog.text


def test_room_that_does_not_come_ends_with_the_arithmetic(nodes):
    with pytest.raises(WaitTimeout, match=r"room for 3 workers: none for learner 0(?s:.*)4.50(?s:.*)what is free now"):
        place([Role("learner", 3, 1.5)], 1.5)
    assert place([Role("learner", 1, 1.5)], 30).remove() is None, "what was reserved is given back"


def test_who_takes_turns_sits_on_one_device(nodes):
    roles = [Role(name, 2, 0.1, 1.0, shared=True) for name in ("rollout", "learner", "value")]
    made = place(roles, 30)
    try:
        for index in range(2):
            seats = {where(seat(made, role.name, index)) for role in roles}
            assert len(seats) == 1 and next(iter(seats))[1] in ("0", "1")
    finally:
        made.remove()


def test_the_run_starts_with_the_base_and_a_late_machine_takes_the_rest(nodes, placement, caplog):
    base = (("rollout", 0), ("verifier", 0), ("learner", 0), ("learner", 1))
    assert all(placement.ready(role, index) for role, index in base)
    until(lambda: placement.ready("rollout", 1) and placement.ready("verifier", 1), "the fourth GPU has a taker")
    assert not placement.ready("rollout", 2) and placement.where("rollout", 2) == ""
    assert where(seat(placement, "rollout", 1))[0] == placement.where("rollout", 1)
    late = seat(placement, "rollout", 2)
    with caplog.at_level(logging.INFO, "rlpipe"):
        nodes.machines.append(nodes.add(1))
        until(lambda: placement.ready("rollout", 2), "the new machine takes it")
    assert "places for rollout 2" in caplog.text
    assert placement.where("rollout", 2) == nodes.machines[-1].node_id == where(late)[0]


def test_a_machine_that_dies_takes_its_own_and_the_base_finds_another_place(nodes, placement, caplog):
    dead = placement.where("learner", 0)
    kept = next(f"rollout {i}" for i in (1, 2) if placement.where("rollout", i) != dead)
    lost = seat(placement, "learner", 0)
    returns = seat(placement, "learner", 0, num_cpus=0, num_gpus=0, max_restarts=1)
    assert where(lost)[0] == where(returns)[0] == dead
    with caplog.at_level(logging.INFO, "rlpipe"):
        nodes.kill(dead)
        early = seat(placement, "learner", 0)
        placement.until_ready(60, "learner")  # Ray has not noticed yet
    assert "no place any more for" in caplog.text and "learner 0" in caplog.text
    assert "gives up its place for" in caplog.text, "all other GPUs were taken by workers that the run can do without"
    assert kept in caplog.text
    for index in range(2):
        assert where(seat(placement, "learner", index))[0] == placement.where("learner", index) != dead
    with pytest.raises(WorkerLost):
        where(early)  # made for a machine that was dead already: it died with it
    with pytest.raises(WorkerLost):
        fetch(lost.where.remote(), "an actor without restarts")
    until(lambda: answers(returns), "an actor with restarts comes back where its bundle is")


def answers(actor) -> bool:
    try:
        return bool(fetch(actor.where.remote(), "an actor"))
    except WorkerLost:
        return False


def test_who_made_room_joins_again(nodes, placement):
    assert not (placement.ready("rollout", 1) and placement.ready("rollout", 2))
    nodes.machines.append(nodes.add(2))
    until(lambda: all(placement.ready("rollout", index) for index in range(3)), "there is room for all again")
    assert where(seat(placement, "rollout", 2))[0] == placement.where("rollout", 2)
    assert any(thread.name == "placement" for thread in threading.enumerate())
