"""Bundles, the ledger and what machines can hold: arithmetic without Ray."""

import itertools

import pytest

from rlpipe import plan, recipe
from rlpipe.bundles import Bundle, Role, bundles_of, gpu_share, ledger, seating, shortage
from rlpipe.errors import ConfigError

EIGHT = {"CPU": 32.0, "GPU": 8.0, "memory": 256 * 2**30}


def bundle(gpus: float, cpus: float = 0.0, memory_gb: float = 0.0, number: int = 0) -> Bundle:
    return Bundle((("rollout", number),), cpus, gpus, memory_gb)


def test_a_run_starts_with_the_base_and_the_others_come_later():
    roles = [Role("rollout", 4, 1.0, 1.0, at_once=2), Role("verifier", 3, 0.5, at_once=1), Role("learner", 2, 1.0, 1.0)]
    found = bundles_of(roles)
    base = [str(b) for b in found if not b.later]
    assert base == ["rollout 0", "rollout 1", "verifier 0", "learner 0", "learner 1"]
    assert [str(b) for b in found[len(base) :]] == ["rollout 2", "rollout 3", "verifier 1", "verifier 2"]
    assert found[0].resources == {"CPU": 1.0, "GPU": 1.0} and found[2].resources == {"CPU": 0.5}
    assert all(not b.later for b in bundles_of([Role("rollout", 4, 1.0), Role("learner", 2, 1.0)])), "all at once by default"
    assert bundles_of([Role("free", 1, 0.0)])[0].resources, "Ray refuses an empty bundle"


def test_roles_that_take_turns_sit_together_and_count_once():
    roles = [
        Role("rollout", 2, 1.0, 1.0, memory_gb=2.0, shared=True),
        Role("verifier", 1, 0.5),
        Role("learner", 2, 1.0, 1.0, memory_gb=4.0, shared=True),
    ]
    found = bundles_of(roles)
    assert [b.seats for b in found] == [
        (("rollout", 0), ("learner", 0)), (("rollout", 1), ("learner", 1)), (("verifier", 0),),
    ]  # fmt: skip
    assert found[0].resources == {"CPU": 2.0, "GPU": 1.0} and found[0].memory_gb == 6.0
    assert [gpu_share(role, roles) for role in roles] == [0.5, 0.0, 0.5]
    table = ledger(roles, EIGHT)
    assert "rollout and learner share their GPUs" in table
    assert next(line for line in table.splitlines() if line.startswith("need")).split()[1:] == ["4.50", "2.00", "12.0", "GB"]
    three = [Role(name, 1, 0.1, 1.0, shared=True) for name in ("rollout", "learner", "value")]
    share = gpu_share(three[0], three)
    assert share * 10_000 == pytest.approx(3333) and 3 * share <= 1


@pytest.mark.parametrize(
    "wanted, has, words",
    [
        ([4.0] * 3, [8.0], "needs 12 GPUs and the cluster has 8"),
        ([2.0] * 4, [3.0] * 3, "4 worker(s) (rollout) need at least 2 GPUs each, on one machine; the machines have room for 3"),
        ([4.0], [2.0, 2.0], "1 worker(s) (rollout) need at least 4 GPUs each"),
        ([0.6] * 3, [2.0], "3 worker(s) (rollout) need at least 0.6 GPUs each"),
        ([0.5] * 4, [2.0], ""),
        ([3.0, 3.0, 1.0, 1.0], [4.0, 4.0], ""),
    ],
)
def test_what_can_never_fit_is_said_with_the_arithmetic(wanted, has, words):
    found = shortage([bundle(gpus) for gpus in wanted], [{"CPU": 4.0, "GPU": gpus} for gpus in has])
    assert found.startswith(f"the run {words}") or words in found if words else not found


def test_a_bundle_needs_all_it_asks_for_on_one_machine():
    machines = [{"CPU": 1.0, "GPU": 4.0}, {"CPU": 16.0}]
    assert "1 GPUs" in shortage([bundle(1.0, cpus=4.0)], machines), "the CPUs are where no GPU is"
    assert not shortage([bundle(1.0, cpus=1.0), bundle(0.0, cpus=8.0)], machines)


def test_host_memory_counts_where_it_is_known():
    machines = [{"CPU": 8.0, "memory": 10 * 2**30}] * 2
    assert "16.0 GB of host memory" in shortage([bundle(0.0, memory_gb=16.0)], machines)
    assert "needs 24.0 GB" in shortage([bundle(0.0, memory_gb=8.0)] * 3, machines)
    assert not shortage([bundle(0.0, memory_gb=12.0)], machines, slack=1.25), "estimates have slack"
    assert "16.0 GB of host memory" in shortage([bundle(0.0, memory_gb=16.0)], machines, slack=1.25), "unscaled in words"
    assert not shortage([bundle(0.0, memory_gb=16.0)], [{"CPU": 8.0}])


def fits(wanted, devices) -> bool:
    """Whether some assignment of bundles to machines of so many GPUs holds, by trying all."""
    for choice in itertools.product(range(len(devices)), repeat=len(wanted)):
        used = [sum(g for g, at in zip(wanted, choice, strict=True) if at == machine) for machine in range(len(devices))]
        if all(u <= d for u, d in zip(used, devices, strict=True)):
            return True
    return False


def test_what_fits_is_never_refused():
    refused = 0
    for devices in itertools.combinations_with_replacement((1, 2, 4), 2):
        for wanted in itertools.combinations_with_replacement((1, 2, 3, 4), 3):
            says = shortage([bundle(float(g)) for g in wanted], [{"GPU": float(d)} for d in devices])
            assert not (says and fits(wanted, devices)), (wanted, devices, says)
            refused += bool(says)
    assert refused > 20


def test_the_seating_shows_who_is_on_which_gpu():
    roles = [
        Role("rollout", 2, 1.0, 2.0), Role("verifier", 4, 0.5), Role("learner", 2, 1.0, 1.0), Role("judge", 1, 1.0, 0.5),
    ]  # fmt: skip
    lines = seating(bundles_of(roles), [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}])
    assert lines == [
        "machine 1  GPU 0: rollout 0 · GPU 1: rollout 0 · GPU 2: rollout 1 · GPU 3: rollout 1 · no GPU: 4 × verifier",
        "machine 2  GPU 0: learner 0 · GPU 1: learner 1 · GPU 2: judge 0",
    ]
    assert seating(bundles_of(roles), [{"CPU": 16.0, "GPU": 4.0}]) == []
    shared = [Role("rollout", 2, 1.0, 1.0, shared=True), Role("learner", 2, 1.0, 1.0, shared=True)]
    assert "GPU 1: rollout 1 + learner 1" in seating(bundles_of(shared), [EIGHT])[0]


def load(*overrides: str):
    return recipe.load(["recipe=quickstart", *overrides])


def test_a_recipe_says_which_roles_there_are():
    cfg = load("rollout.workers=4", "rollout.min_workers=1", "guide.model=some/model", "guide.gpus=2", "judge.url=http://x/v1")
    roles = {role.name: role for role in plan.roles(cfg)}
    assert roles["rollout"].first == 1 and roles["verifier"].first == 1 and roles["learner"].first == 1
    assert roles["guide"].gpus == 2 and "judge" not in roles, "a server that runs somewhere needs no place"
    assert {role.first == role.workers for role in plan.roles(load())} == {True}


def test_a_plan_counts_gpus_that_are_shared_once():
    cfg = load("cluster.colocate=[rollout, learner]", "rollout.gpus=1", "learner.workers=2", "learner.gpus=1")
    recipe.check(cfg)
    text = plan.describe(cfg, {"CPU": 8.0, "GPU": 2.0, "memory": 2.0**38})
    assert "GPU 0: rollout 0 + learner 0 · GPU 1: rollout 1 + learner 1" in text
    assert any(line.startswith("2 GPUs") for line in plan.needs(cfg)) or not plan.local_resources()["GPU"] < 2


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["cluster.colocate=[rollout]"], "at least two"),
        (["cluster.colocate=[rollout, verifer]"], "rollout, learner, value"),
        (["cluster.colocate=[rollout, learner]"], "rollout.workers=2 and learner.workers=1"),
        (["cluster.colocate=[rollout, learner]", "learner.workers=2", "rollout.gpus=1"], "rollout.gpus=1 and learner.gpus=0"),
        (
            ["cluster.colocate=[rollout, learner]", "learner.workers=2", "rollout.gpus=2", "learner.gpus=2"],
            "learner.gpus=1 and learner.workers=4",
        ),
        (["cluster.colocate=[rollout, learner]", "learner.workers=2", "mode=async"], "mode=sync"),
        (["cluster.colocate=[rollout, learner]", "learner.workers=2", "rollout.oversample=1.5"], "oversample"),
        (["cluster.colocate=[rollout, learner]", "learner.workers=2", "rollout.min_workers=1"], "min_workers"),
        (["cluster.colocate=[learner, value]"], "value.enabled"),
        (["cluster.colocate=[learner, value]", "value.enabled=true"], "same time"),
        (["rollout.min_workers=3"], "rollout.min_workers=3"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        recipe.check(load(*overrides))
