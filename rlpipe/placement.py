"""Where every worker is, or will be: places reserved with Ray, watched, and moved when machines die or come.

Ray is imported inside functions, so that plans can be made without it.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlpipe.bundles import Bundle, Role, Seat, bundles_of, gpu_share, ledger
from rlpipe.errors import WaitTimeout

log = logging.getLogger("rlpipe")

EVERY_S = 10.0  # a line in the log of a wait
POLL_S, LOOK_S = 0.1, 1.0  # between two looks at Ray's table of places: while somebody waits, and else
GIVE_WAY_S = 3.0  # Ray gets so long to find a place before later workers have to make room
CONNECT_S = 2.0  # a machine that does not answer a connection for so long is taken for dead
SHOWN = 6  # names in a line


@dataclass(slots=True)
class _Group:
    """A placement group of Ray's. nodes: id of the machine of each bundle, empty without a place."""

    handle: Any
    bundles: list[Bundle]
    nodes: list[str]

    @classmethod
    def ask(cls, bundles: Sequence[Bundle]) -> _Group:
        from ray.util import placement_group

        return cls(placement_group([b.resources for b in bundles], strategy="PACK"), list(bundles), [""] * len(bundles))

    def give_up(self) -> None:
        """Workers in it are ended."""
        from ray.util import remove_placement_group

        remove_placement_group(self.handle)


class Placement:
    """Where every worker is, or will be. What the run starts with is one group, reserved all at once; each further worker has a
    group of its own, which takes room as it appears (an autoscaler sees those that wait). A machine that dies takes only the
    bundles on it: Ray finds them another place, and until then they have none. Safe to ask from any thread.
    """

    def __init__(self, roles: Sequence[Role]):
        self.roles = {role.name: role for role in roles}
        bundles = bundles_of(roles)
        self.groups = [_Group.ask([bundle for bundle in bundles if not bundle.later])]
        self.waiting = [bundle for bundle in bundles if bundle.later]
        self._seats: dict[Seat, tuple[int, int]] = {}
        self._index(self.groups[0], 0)
        self._lock, self._over = threading.Lock(), threading.Event()

    def _index(self, group: _Group, number: int) -> None:
        for place, bundle in enumerate(group.bundles):
            self._seats |= {seat: (number, place) for seat in bundle.seats}

    def ask_for_the_rest(self) -> None:
        """Once the base has its places: earlier, a single worker could take what the base needs."""
        for bundle in self.waiting:
            self.groups.append(_Group.ask([bundle]))
            self._index(self.groups[-1], len(self.groups) - 1)
        self.waiting = []

    def options(self, role: str, index: int) -> dict[str, Any]:
        """For `Actor.options(**…)`: the worker's bundle and share. An actor that is made before its bundle has a place waits
        for it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        wanted, (number, place) = self.roles[role], self._seats[role, index]
        strategy = PlacementGroupSchedulingStrategy(self.groups[number].handle, placement_group_bundle_index=place)
        share = gpu_share(wanted, list(self.roles.values()))
        return {"num_cpus": wanted.cpus, "num_gpus": share, "scheduling_strategy": strategy}

    def ready(self, role: str, index: int) -> bool:
        """Whether the worker has a place now, as of about a second ago."""
        return bool(self.where(role, index))

    def where(self, role: str, index: int) -> str:
        """Id of the machine that the worker's place is on, as of about a second ago; empty if it has none."""
        with self._lock:
            number, place = self._seats.get((role, index), (-1, 0))
            return self.groups[number].nodes[place] if number >= 0 else ""

    def until_ready(self, timeout_s: float, role: str = "") -> None:
        """Wait until everything that the run cannot do without has a place, or what one role needs of it (after a machine's
        death), on machines that answer: an actor made for a dead one would die with it. Raises WaitTimeout with the arithmetic.
        """
        started = said = time.monotonic()
        what = f"a place for every {role}" if role else f"room for {len(self.groups[0].bundles)} workers"
        while lacking := self._without_place(role) or self._on_dead_machines(role):
            now = time.monotonic()
            if now - started >= timeout_s:
                raise WaitTimeout(self._arithmetic(lacking, what, timeout_s))
            if now - said >= EVERY_S:
                said = now
                log.info("waiting for %s: none yet for %s (%.0f s of %.0f s)", what, _names(lacking), now - started, timeout_s)
            time.sleep(POLL_S)

    def watch(self) -> None:
        """From now on, know where everybody is, and let later workers make room for the base when it has lost its place."""
        threading.Thread(target=self._watch, name="placement", daemon=True).start()

    def _watch(self) -> None:
        import ray

        lost = 0.0
        while not self._over.wait(LOOK_S) and ray.is_initialized():
            try:
                lacking = self._without_place("")
                lost = lost + LOOK_S if lacking else 0.0
                if lost >= GIVE_WAY_S:
                    lost = 0.0
                    self._make_room(lacking)
            except Exception as error:  # Ray's head may be away for a moment; whoever waits has a deadline
                if not self._over.is_set():
                    log.warning("where the workers are is not known at the moment: %s", error)

    def _base(self, role: str) -> list[tuple[Bundle, str]]:
        """(bundle, its machine) of the base as last seen, and of the role if one is named."""
        with self._lock:
            found = list(zip(self.groups[0].bundles, self.groups[0].nodes, strict=True))
        return [(bundle, node) for bundle, node in found if not role or any(name == role for name, _ in bundle.seats)]

    def _without_place(self, role: str) -> list[Bundle]:
        self._look()
        return [bundle for bundle, node in self._base(role) if not node]

    def _on_dead_machines(self, role: str) -> list[Bundle]:
        import ray

        used = {node for _, node in self._base(role)}
        dead = {node["NodeID"] for node in ray.nodes() if node["NodeID"] in used and not _answers(node)}
        return [bundle for bundle, node in self._base(role) if node in dead]

    def _arithmetic(self, lacking: Sequence[Bundle], what: str, timeout_s: float) -> str:
        import ray

        table = ledger(list(self.roles.values()), ray.available_resources())
        return f"{what}: none for {_names(lacking)} after {timeout_s:.0f} s\n{table}\n(what is free now)"

    def _make_room(self, lacking: Sequence[Bundle]) -> None:
        """One later worker, the newest, for each bundle of the base without a place: Ray finds places for all of these or for
        none. The base is served first, and who made room waits at the end of the queue. Nobody has to while all that is missing
        are workers of which there are others."""
        with self._lock:
            placed = [number for number in range(1, len(self.groups)) if self.groups[number].nodes[0]]
            others = {role for number in placed for role, _ in self.groups[number].bundles[0].seats}
            if self._over.is_set() or all(role in others for bundle in lacking for role, _ in bundle.seats):
                return
            scarce = [bundle for bundle in lacking if bundle.gpus] or lacking
            for bundle in scarce:
                fitting = [n for n in placed if _helps(self.groups[n].bundles[0], bundle)]
                if not fitting:
                    continue
                placed.remove(fitting[-1])
                given = self.groups[fitting[-1]]
                log.warning("%s gives up its place for %s, which the run cannot do without", given.bundles[0], bundle)
                given.give_up()
                self.groups[fitting[-1]] = _Group.ask(given.bundles)

    def _look(self) -> None:
        """Ask Ray where the bundles are, and say what changed."""
        from ray.util.placement_group import placement_group_table

        alone = len(self.groups) == 1
        tables = {} if alone else placement_group_table()  # not under the lock: Ray's head may take its time
        if alone:
            tables[self.groups[0].handle.id.hex()] = placement_group_table(self.groups[0].handle)
        came, went = [], []
        with self._lock:
            for group in self.groups:
                nodes = tables.get(group.handle.id.hex(), {}).get("bundles_to_node_id", {})
                for place, bundle in enumerate(group.bundles):
                    before, now = group.nodes[place], nodes.get(place, "")
                    group.nodes[place] = now
                    if before != now:
                        (came if now else went).append(bundle)
        if went:
            log.warning("no place any more for %s: a machine is gone, or somebody needs it more", _names(went))
        if came:
            log.info("places for %s", _names(came))

    def remove(self) -> None:
        """Give everything back; workers in it are ended."""
        self._over.set()
        with self._lock:
            for group in self.groups:
                group.give_up()


def _helps(later: Bundle, bundle: Bundle) -> bool:
    """Whether its GPUs would do, or its CPUs where no GPU is asked for."""
    return later.gpus >= bundle.gpus if bundle.gpus else later.cpus >= bundle.cpus


def _answers(machine: dict[str, Any]) -> bool:
    """Whether something listens where the machine's part of Ray did. Ray itself takes seconds to notice a death."""
    try:
        socket.create_connection((machine["NodeManagerAddress"], machine["NodeManagerPort"]), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


def _names(bundles: Sequence[Bundle]) -> str:
    return ", ".join(str(bundle) for bundle in bundles[:SHOWN]) + (f" … ({len(bundles)})" if len(bundles) > SHOWN else "")


def place(roles: Sequence[Role], timeout_s: float) -> Placement:
    """Reserve room for every worker that the run starts with, packed onto few machines, and ask for the others'. Raises
    WaitTimeout with the ledger if it does not come."""
    placement = Placement(roles)
    try:
        placement.until_ready(timeout_s)
    except BaseException:
        placement.remove()
        raise
    placement.ask_for_the_rest()
    placement.watch()
    return placement
