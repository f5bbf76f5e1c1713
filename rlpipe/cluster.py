"""Connecting to Ray, what the cluster has, and waiting: the only module that calls ray.get or ray.wait.

Ray is imported inside functions, so that plans and configurations can be made without it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from typing import Any

from rlpipe.bundles import Role, bundles_of, ledger, shortage
from rlpipe.config import ClusterConfig
from rlpipe.errors import ClusterError, RlpipeError, WaitTimeout, WorkerLost
from rlpipe.placement import Placement as Placement
from rlpipe.placement import place as place

log = logging.getLogger("rlpipe")
_started_here = False

MEMORY_SLACK = 1.25  # estimates of host memory may be so much too high before a run is refused
EVERY_S = 10.0  # a line in the log of a wait


def connect(cfg: ClusterConfig, *, need_cpus: float, need_gpus: float) -> None:
    """Join a cluster or start a lean local one.

    `auto` joins only what was meant: a job's own cluster or RAY_ADDRESS; a Ray that merely runs on this machine may be somebody
    else's. A local cluster offers at least `need_cpus` logical CPUs, because the roles of a small run take turns.
    """
    global _started_here
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    address = address_to_join(cfg)
    if address:
        ray.init(address=address, **quiet)
        log.info("joined the Ray cluster at %s", address)
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster; Ray would otherwise write a token file
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(need_cpus)),
        include_dashboard=False,
        object_store_memory=cfg.object_store_mb * 2**20,
        **quiet,
    )
    _started_here = True
    log.info("started a local Ray cluster")


def address_to_join(cfg: ClusterConfig) -> str | None:
    """The cluster that a run joins, None if it starts its own."""
    address = os.environ.get("RAY_ADDRESS") if cfg.address == "auto" else cfg.address
    return None if address == "local" else address or None


def resources() -> dict[str, float]:
    """All resources of the connected cluster, in Ray's terms."""
    import ray

    return ray.cluster_resources()


def disconnect() -> None:
    """End the connection, and the cluster if we started it."""
    global _started_here
    import ray

    if ray.is_initialized():
        ray.shutdown()
    _started_here = False


def machines() -> list[dict[str, float]]:
    """What each live machine of the connected cluster has, in Ray's terms."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def autoscales() -> bool:
    """Whether the connected cluster grows by itself. Ray does not say so outright: version 2 of its autoscaler leaves a mark;
    version 1 reports machines by the types of its configuration, and a cluster without one has types made of node ids."""
    import ray
    from ray.experimental import internal_kv

    if internal_kv._internal_kv_get(b"__autoscaler_v2_enabled", namespace=b"__autoscaler") == b"1":
        return True
    status = internal_kv._internal_kv_get(ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS)
    report = (json.loads(status).get("autoscaler_report") or {}) if status else {}
    return any(not kind.startswith("node_") for kind in report.get("active_nodes") or {})


def preflight(roles: Sequence[Role]) -> None:
    """Raises ClusterError, with the arithmetic, if the connected cluster can never hold what the run starts with; on a cluster
    that grows by itself that is a warning. Host memory is an estimate: it refuses past the slack, and warns up to there."""
    has, bundles = machines(), bundles_of(roles)
    first = [bundle for bundle in bundles if not bundle.later]
    lacking = shortage(first, has, MEMORY_SLACK)
    if lacking:
        table = ledger(roles, resources())
        if not autoscales():
            raise ClusterError(
                f"{lacking}:\n{table}\nUse fewer workers, lower the roles' `cpus` or `gpus`, or join a larger cluster "
                "(cluster.address)"
            )
        log.warning("%s; the cluster grows by itself, so the run waits for more machines:\n%s", lacking, table)
        return
    tight = shortage(first, has)
    if tight:
        log.warning("%s, as far as can be estimated; the kernel may end a worker", tight)
    later = shortage(bundles, has)
    if later:
        log.info("%s: %d worker(s) join when there is room for them", later, len(bundles) - len(first))


def wait(references: Sequence[Any], *, what: str, timeout_s: float, every_s: float = EVERY_S) -> list[Any]:
    """Results of all references, in order. A line every `every_s` seconds; raises WaitTimeout at the deadline.

    An rlpipe error raised remotely arrives as itself; a dead worker as WorkerLost.
    """
    import ray

    started, pending = time.monotonic(), list(references)
    while pending:
        waited = time.monotonic() - started
        if waited >= timeout_s:
            done = len(references) - len(pending)
            raise WaitTimeout(
                f"{what}: {done}/{len(references)} after {timeout_s:.0f} s. Raise the deadline, or see the log for a stall"
            )
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=min(every_s, timeout_s - waited), fetch_local=False)
        if pending:
            done = len(references) - len(pending)
            log.info(
                "waiting for %s: %d/%d (%.0f s of %.0f s)", what, done, len(references), time.monotonic() - started, timeout_s
            )
            _raise_failed(set(references) - set(pending), what)
    return [fetch(reference, what) for reference in references]


def finished(references: Sequence[Any], timeout_s: float, every: bool = False) -> list[Any]:
    """References that are done, after at most timeout_s and as soon as one is; for loops with deadlines of their own. every:
    all that are done by then, not only the first."""
    import ray

    done, _ = ray.wait(list(references), timeout=max(0.0, timeout_s), fetch_local=False)
    if every and done and len(references) > 1:
        done, _ = ray.wait(list(references), num_returns=len(references), timeout=0, fetch_local=False)
    return done


def _raise_failed(done: set, what: str) -> None:
    """One failed reference ends the wait: the others may never come (peers in a collective)."""
    for reference in done:
        fetch(reference, what)


def fetch(reference: Any, what: str) -> Any:
    """The value of a finished reference, with Ray's wrappers taken off its errors."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, BaseException) else None
        if isinstance(cause, RlpipeError):
            raise cause from None
        raise
    except ray.exceptions.RayActorError as error:
        raise WorkerLost(f"{what}: a worker died ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an error says, without what Ray and torch add to it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
