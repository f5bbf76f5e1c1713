"""What the cluster holds, sampled beside the run: the object stores, the nodes, and the driver's own memory.

Ray's global state answers in well under a millisecond and needs no dashboard; its own metrics are left alone.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from rlpipe.usage import node_memory_share, resident_mb

OBJECT_STORE = "object_store_memory"  # Ray's name of the resource, bytes
FAILURES = 12  # in a row, and the sampler gives up


def cluster_state() -> dict[str, float]:
    """nodes: alive · object_store_mb: used, over all nodes (MiB) · object_store_share: of the fullest node, 0 to 1 ·
    memory_driver_mb: resident (MiB) · node_memory_share: of the driver's machine.

    Without a connection to Ray only the last two. Raises what Ray raises if its state cannot be reached.
    """
    state = {"memory_driver_mb": resident_mb()[0]}
    share = node_memory_share()
    if share is not None:
        state["node_memory_share"] = share
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return state
    from ray._private import state as ray_state  # `ray.available_resources` is the sum only; the fullest node is what stalls

    total, free = ray_state.total_resources_per_node(), ray_state.available_resources_per_node()
    stores = [(has[OBJECT_STORE], free[node].get(OBJECT_STORE, 0.0)) for node, has in total.items() if _shares(node, has, free)]
    state["nodes"] = float(len(total))
    state["object_store_mb"] = sum(size - left for size, left in stores) / 2**20
    state["object_store_share"] = max((1.0 - left / size for size, left in stores), default=0.0)
    return state


def _shares(node: str, has: dict[str, float], free: dict[str, dict[str, float]]) -> bool:
    """Whether the node has a store and is in both answers: nodes come and go between them."""
    return has.get(OBJECT_STORE, 0.0) > 0 and node in free


class Sampler:
    """Reads `state` every `every_s` seconds in a thread of its own; `reading` gives the largest values since the last one.

    A failure is no reading; FAILURES in a row end the sampler, which `warn` hears.
    """

    def __init__(
        self, warn: Callable[[str], None], every_s: float = 5.0, state: Callable[[], dict[str, float]] = cluster_state
    ):
        self.every_s, self._warn, self._state = every_s, warn, state
        self._lock = threading.Lock()
        self._most: dict[str, float] = {}
        self._nodes: float | None = None  # the newest count, not the largest
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resources", daemon=True)
        self._thread.start()

    def reading(self) -> dict[str, float]:
        """As `cluster_state`; empty if nothing was read since the last reading."""
        with self._lock:
            most, self._most = self._most, {}
            return most | ({"nodes": self._nodes} if most and self._nodes is not None else {})

    def close(self) -> None:
        """End the thread; before the connection to Ray is closed. One that Ray does not answer is left behind."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                self._keep(self._state())
                failures = 0
            except Exception as error:  # whatever Ray raises while its head is away costs a reading, not the run
                failures += 1
                if failures == FAILURES:
                    self._warn(f"the cluster's state cannot be read ({type(error).__name__}: {error}); no more of it is logged")
                    return
            self._stop.wait(max(0.0, self.every_s - (time.monotonic() - started)))

    def _keep(self, state: dict[str, float]) -> None:
        with self._lock:
            self._nodes = state.get("nodes", self._nodes)
            for key, value in state.items():
                self._most[key] = max(value, self._most.get(key, value))
