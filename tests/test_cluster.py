"""Named waits, places and the ledger on a real Ray of one machine; several machines are in test_nodes."""

import logging
import os
import time

import pytest

from rlpipe import cluster
from rlpipe.cluster import Role, ledger, place, preflight, wait
from rlpipe.errors import ClusterError, WaitTimeout, WorkerLost


class Worker:
    """Can hang."""

    def pid(self) -> int:
        return os.getpid()

    def hang(self) -> None:
        time.sleep(600)


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

    actor = ray.remote(Worker).options(num_cpus=0.1).remote()
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
    machine = placement.where("rollout", 1)
    assert machine and placement.ready("rollout", 0) and not placement.ready("rollout", 2), "there are two"
    placement.until_ready(1.0, "rollout")
    placement.remove()


def test_what_a_local_cluster_has(ray_session):
    (machine,) = cluster.machines()
    assert machine["CPU"] >= 8 and machine["memory"] > 2**30
    assert not cluster.autoscales()


@pytest.mark.parametrize(
    "version, status, grows",
    [
        (b"0", None, False),
        (None, b"", False),
        (b"1", None, True),
        (b"0", b'{"autoscaler_report": {"active_nodes": {"node_12ab": 1}}}', False),
        (b"0", b'{"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}}', True),
        (b"0", b'{"autoscaler_report": null}', False),
    ],
)
def test_a_cluster_that_grows_is_known_by_what_its_autoscaler_leaves(version, status, grows, monkeypatch):
    from ray.experimental import internal_kv

    def get(key, namespace=None):
        return version if namespace else status

    monkeypatch.setattr(internal_kv, "_internal_kv_get", get)
    assert cluster.autoscales() == grows
