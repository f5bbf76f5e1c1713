"""Which workers sit together, what each place takes, and whether machines can hold them: worked out without Ray.

A bundle is a place on one machine: the resources of one worker, or of several roles' workers that share a GPU and take turns.
Machines are dicts in Ray's terms, {"CPU": 8.0, "GPU": 2.0, "memory": bytes, …}.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GB = 2**30
TINY = 1e-6  # what sums of fractions may be off by
FINEST = 10_000  # Ray counts resources in ten-thousandths
NOTHING = {"CPU": 0.001}  # of a worker that asks for nothing: Ray refuses an empty bundle
Machine = Mapping[str, float]
Seat = tuple[str, int]  # role, index


@dataclass(frozen=True, slots=True)
class Role:
    """What one kind of worker needs. cpus and gpus are Ray's bookkeeping, per worker; memory_gb is an estimate, 0 unknown.

    at_once: the run starts with so many, and the others join as room for them appears; 0: all. shared: its i-th worker sits on
    the GPU of the i-th worker of the other shared roles, which need equally many workers and GPUs.
    """

    name: str
    workers: int
    cpus: float
    gpus: float = 0.0
    memory_gb: float = 0.0
    at_once: int = 0
    shared: bool = False

    @property
    def first(self) -> int:
        return min(self.at_once, self.workers) or self.workers


@dataclass(frozen=True, slots=True)
class Bundle:
    """One place. later: the run starts without it."""

    seats: tuple[Seat, ...]
    cpus: float
    gpus: float
    memory_gb: float
    later: bool = False

    @property
    def resources(self) -> dict[str, float]:
        """What Ray is asked to reserve; memory is only counted beforehand, because it is an estimate."""
        return {key: amount for key, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount} or dict(NOTHING)

    @property
    def needs(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory_gb * GB}

    def __str__(self) -> str:
        return " + ".join(f"{role} {index}" for role, index in self.seats)


def bundles_of(roles: Sequence[Role]) -> list[Bundle]:
    """Every worker's place, those that the run starts with before the others; each part in the order of the roles."""
    shared = [role for role in roles if role.shared]
    found = []
    for role in roles:
        if role.shared and role is not shared[0]:
            continue
        together = shared if role.shared else [role]
        for index in range(role.workers):
            found.append(
                Bundle(
                    seats=tuple((each.name, index) for each in together),
                    cpus=sum(each.cpus for each in together),
                    gpus=role.gpus,
                    memory_gb=sum(each.memory_gb for each in together),
                    later=index >= role.first,
                )
            )
    return sorted(found, key=lambda bundle: bundle.later)


def gpu_share(role: Role, roles: Sequence[Role]) -> float:
    """GPUs that one worker asks of its bundle. Those that share a GPU ask for equal parts that Ray can count: three of 0.3333
    fit on one, and Ray gives parts of a bundle with one GPU the same device."""
    sharers = sum(each.shared for each in roles) if role.shared else 1
    return role.gpus if sharers == 1 else math.floor(role.gpus / sharers * FINEST) / FINEST


def ledger(roles: Sequence[Role], resources: Machine) -> str:
    """A table of what the roles ask for against what the cluster has (in Ray's terms). GPUs that roles share count once."""
    lines = [f"{'role':<12}{'workers':>8}{'at once':>9}{'CPUs':>10}{'GPUs':>8}{'host memory':>14}"]
    for role in roles:
        memory = f"{role.workers * role.memory_gb:.1f} GB" if role.memory_gb else "unknown"
        lines.append(
            f"{role.name:<12}{role.workers:>8}{role.first:>9}{role.workers * role.cpus:>10.2f}"
            f"{role.workers * role.gpus:>8.2f}{memory:>14}"
        )
    bundles = bundles_of(roles)
    at_once = [bundle for bundle in bundles if not bundle.later]
    lines.append(_sums("need", bundles))
    if len(at_once) < len(bundles):
        lines.append(_sums("  at once", at_once))
    has_memory = f"{resources['memory'] / GB:.1f} GB" if "memory" in resources else "unknown"
    lines.append(
        f"{'cluster has':<12}{'':>17}{resources.get('CPU', 0.0):>10.2f}{resources.get('GPU', 0.0):>8.2f}{has_memory:>14}"
    )
    sharing = [role.name for role in roles if role.shared]
    if sharing:
        lines.append(f"{' and '.join(sharing)} share their GPUs and take turns, so these count once")
    return "\n".join(lines)


def _sums(name: str, bundles: Sequence[Bundle]) -> str:
    memory = sum(bundle.memory_gb for bundle in bundles)
    return (
        f"{name:<12}{'':>17}{sum(b.cpus for b in bundles):>10.2f}{sum(b.gpus for b in bundles):>8.2f}"
        f"{f'{memory:.1f} GB' if memory else '':>14}"
    ).rstrip()


def shortage(bundles: Sequence[Bundle], machines: Sequence[Machine], slack: float = 1.0) -> str:
    """Why no arrangement can hold the bundles, with the arithmetic; empty if nothing speaks against it.

    Two tests that never refuse what fits: the sums, and, for every size that occurs, how many places of at least that size the
    machines have (a fraction of a GPU lies on one device). What passes both can still fail to fit. slack: host memory,
    which is an estimate, may be asked for by this factor too much; it counts only where all machines say what they have.
    """
    known = ["CPU", "GPU"] + ["memory"] * all("memory" in machine for machine in machines)
    asked = [{key: bundle.needs[key] for key in known} for bundle in bundles]
    for key in known:
        need, has = sum(each[key] for each in asked), sum(machine.get(key, 0.0) for machine in machines)
        if need > has * (slack if key == "memory" else 1 + TINY) + TINY:
            return f"the run needs {_amount(key, need)} and the cluster has {_amount(key, has, named=False)}"
    for wanted in {tuple(each.items()): each for each in asked}.values():
        as_large = [
            bundle for bundle, each in zip(bundles, asked, strict=True) if all(each[k] >= wanted[k] - TINY for k in wanted)
        ]
        room = [_room(wanted, {**machine, "memory": machine.get("memory", 0.0) * slack}) for machine in machines]
        if len(as_large) > sum(room):
            what = " and ".join(_amount(key, amount) for key, amount in wanted.items() if amount)
            who = ", ".join(sorted({role for bundle in as_large for role, _ in bundle.seats}))
            places = " + ".join(f"{n} × {count}" if n > 1 else f"{count}" for count, n in sorted(Counter(room).items()))
            return (
                f"{len(as_large)} worker(s) ({who}) need at least {what} each, on one machine; the machines have room for "
                f"{sum(room)} of them ({places} on each)"
            )
    return ""


def _room(wanted: Mapping[str, float], machine: Machine) -> float:
    """How many such bundles one machine holds."""
    counts = [math.inf]
    for key, amount in wanted.items():
        has = machine.get(key, 0.0)
        if key == "GPU" and 0 < amount < 1:
            counts.append(math.floor(has + TINY) * math.floor(1 / amount + TINY))
        elif amount:
            counts.append(math.floor(has / amount + TINY))
    return min(counts)


def _amount(key: str, amount: float, named: bool = True) -> str:
    if key == "memory":
        return f"{amount / GB:.1f} GB" + " of host memory" * named
    return f"{amount:g}" + f" {key}s" * named


def seating(bundles: Sequence[Bundle], machines: Sequence[Machine]) -> list[str]:
    """A line for each machine that is used: who sits on which GPU, filled in the bundles' order. Ray decides in the end, and
    fills machines up in about this way. Empty if they do not fit in this order."""
    free = [dict(machine) for machine in machines]
    devices = [[1.0] * int(machine.get("GPU", 0.0) + TINY) for machine in machines]
    on: list[list[list[str]]] = [[[] for _ in gpus] for gpus in devices]
    beside: list[Counter] = [Counter() for _ in machines]
    for bundle in sorted(bundles, key=lambda bundle: -bundle.gpus):
        for at, left in enumerate(free):
            taken = _devices(bundle.gpus, devices[at])
            if taken is None or left.get("CPU", 0.0) < bundle.cpus - TINY:
                continue
            left["CPU"] = left.get("CPU", 0.0) - bundle.cpus
            for device in taken:
                devices[at][device] -= min(1.0, bundle.gpus)
                on[at][device].append(str(bundle))
            if not taken:
                beside[at].update(role for role, _ in bundle.seats)
            break
        else:
            return []
    return [_machine_line(at, on[at], beside[at]) for at in range(len(machines)) if any(on[at]) or beside[at]]


def _devices(gpus: float, left: Sequence[float]) -> list[int] | None:
    """Devices that a bundle takes, None if there are not enough."""
    if not gpus:
        return []
    each, count = min(1.0, gpus), max(1, round(gpus))
    found = [device for device, share in enumerate(left) if share >= each - TINY][:count]
    return found if len(found) == count else None


def _machine_line(number: int, on: Sequence[Sequence[str]], beside: Counter) -> str:
    parts = [f"GPU {device}: {', '.join(who)}" for device, who in enumerate(on) if who]
    if beside:
        parts.append("no GPU: " + ", ".join(f"{count} × {role}" for role, count in beside.items()))
    return f"machine {number + 1}  " + " · ".join(parts)
