"""Connecting to Ray, placing roles, and waiting: the only module that calls ray.get or ray.wait.

Ray is imported inside functions, so that plans and configurations can be made without it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlpipe.config import ClusterConfig
from rlpipe.errors import ClusterError, RlpipeError, WaitTimeout, WorkerLost

log = logging.getLogger("rlpipe")
_started_here = False


@dataclass(frozen=True, slots=True)
class Role:
    """What one kind of worker needs. cpus and gpus are Ray's bookkeeping, per worker; memory_gb is an estimate, 0 unknown."""

    name: str
    workers: int
    cpus: float
    gpus: float = 0.0
    memory_gb: float = 0.0


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


def ledger(roles: Sequence[Role], resources: dict[str, float]) -> str:
    """A table of what the roles ask for against what the cluster has (Ray's resource dict)."""
    lines = [f"{'role':<12}{'workers':>8}{'CPUs':>10}{'GPUs':>8}{'host memory':>14}"]
    for role in roles:
        memory = f"{role.workers * role.memory_gb:.1f} GB" if role.memory_gb else "unknown"
        lines.append(
            f"{role.name:<12}{role.workers:>8}{role.workers * role.cpus:>10.2f}{role.workers * role.gpus:>8.2f}{memory:>14}"
        )
    cpus, gpus = (sum(r.workers * getattr(r, k) for r in roles) for k in ("cpus", "gpus"))
    has_memory = f"{resources['memory'] / 2**30:.1f} GB" if "memory" in resources else "unknown"
    lines.append(f"{'need':<12}{'':>8}{cpus:>10.2f}{gpus:>8.2f}")
    lines.append(
        f"{'cluster has':<12}{'':>8}{resources.get('CPU', 0.0):>10.2f}{resources.get('GPU', 0.0):>8.2f}{has_memory:>14}"
    )
    return "\n".join(lines)


def preflight(roles: Sequence[Role]) -> None:
    """Raises ClusterError, with the arithmetic, if the connected cluster can never hold the roles."""
    has = resources()
    for key, kind in (("CPU", "cpus"), ("GPU", "gpus")):
        need = sum(role.workers * getattr(role, kind) for role in roles)
        if need > has.get(key, 0.0) + 1e-6:
            raise ClusterError(
                f"the run needs {need:g} {key}s and the cluster has {has.get(key, 0.0):g}:\n{ledger(roles, has)}\n"
                f"Use fewer workers, lower the roles' `{kind}`, or join a larger cluster (cluster.address)"
            )


class Placement:
    """A placement group with one bundle a worker."""

    def __init__(self, group: Any, index: dict[tuple[str, int], int], roles: dict[str, Role]):
        self.group, self.index, self.roles = group, index, roles

    def options(self, role: str, index: int) -> dict[str, Any]:
        """For `Actor.options(**…)`: the worker's bundle and share."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        wanted = self.roles[role]
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.index[role, index])
        return {"num_cpus": wanted.cpus, "num_gpus": wanted.gpus, "scheduling_strategy": strategy}

    def remove(self) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(self.group)


def place(roles: Sequence[Role], timeout_s: float) -> Placement:
    """Reserve room for every worker, packed onto few nodes. Raises WaitTimeout with the ledger if it does not come."""
    import ray
    from ray.util import placement_group

    index: dict[tuple[str, int], int] = {}
    bundles = []
    for role in roles:
        for worker in range(role.workers):
            index[role.name, worker] = len(bundles)
            bundle = {"CPU": role.cpus, "GPU": role.gpus}
            bundles.append({k: v for k, v in bundle.items() if v} or {"CPU": 0.001})
    group = placement_group(bundles, strategy="PACK")
    try:
        wait([group.ready()], what=f"room for {len(bundles)} workers", timeout_s=timeout_s)
    except WaitTimeout as error:
        raise WaitTimeout(f"{error}\n{ledger(roles, ray.available_resources())}\n(what is free now)") from error
    return Placement(group, index, {role.name: role for role in roles})


def wait(references: Sequence[Any], *, what: str, timeout_s: float, every_s: float = 10.0) -> list[Any]:
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


def finished(references: Sequence[Any], timeout_s: float) -> list[Any]:
    """References that are done, after at most timeout_s and as soon as one is; for loops with deadlines of their own."""
    import ray

    return ray.wait(list(references), timeout=max(0.0, timeout_s), fetch_local=False)[0]


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
        raise WorkerLost(f"{what}: a worker died ({str(error).strip().splitlines()[0]})") from error
