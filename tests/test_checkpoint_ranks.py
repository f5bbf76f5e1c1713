"""Real DeepSpeed ranks: what is written while they train on, on full disks, and read by another number of them."""

import dataclasses
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpipe.config import LearnerConfig, ValueConfig
from rlpipe.errors import CheckpointError

pytestmark = pytest.mark.timeout(600)


class Rank:
    """A rank that makes learners of any kind, one after the other, and does with them what a test says."""

    def __init__(self, rank: int, world: int, here: str):
        import sys

        sys.path.insert(0, here)
        torch.set_num_threads(1)
        self.rank, self.world = rank, world

    def address(self) -> str:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{probe.getsockname()[1]}"

    def join(self, master: str) -> None:
        from rlpipe.learner.engine import join_process_group

        join_process_group(self.rank, self.world, master, 120.0)

    def make(self, kind: str, stage: int) -> None:
        """kind: policy | lora | lagged | value. Its experience comes with it."""
        from test_learner import LEARNER, experience, fresh, learner_of
        from tiny_models import tiny

        from rlpipe.learner.micro_batches import make_shards
        from rlpipe.learner.value import ValueLearner
        from rlpipe.models.value import ValueModel

        self.kind = kind
        algo = {"kl_reference": "lagged", "kl_lag": 1} if kind == "lagged" else {}
        plan = experience("block", **algo)
        samples = plan.samples
        if kind == "value":
            samples = [dataclasses.replace(s, returns=np.zeros_like(s.rollout_logp) + np.sign(s.advantage[0])) for s in samples]
            config = LearnerConfig(zero_stage=stage, workers=self.world, **LEARNER)
            self.learner = ValueLearner(ValueModel(fresh(tiny("block")[0])), ValueConfig(lr=3e-3), config, 40)
        else:
            self.learner = learner_of("block", self.world, stage, 60, False, lora=4 if kind == "lora" else 0, **algo)
        self.shard = make_shards(samples, plan.updates, [], 60, self.world)[self.rank]

    def train(self) -> dict[str, torch.Tensor]:
        """A step of four updates; the weights after it, on rank 0."""
        if self.kind == "value":
            self.learner.score(self.shard)
        self.learner.train(self.shard, 1)
        return self.weights()

    def weights(self) -> dict[str, torch.Tensor]:
        found = self.learner.engine.state()
        if self.kind == "value":
            with self.learner.engine.gathered(list(self.learner.engine.model.head.parameters())):
                found["head"] = self.learner.engine.model.head.weight.detach().clone()
        return found

    def tokenizer(self):
        from tiny_models import tiny

        return tiny("block")[1]

    def save(self, folder: str) -> None:
        self.learner.snapshot(Path(folder), self.tokenizer())
        self.learner.engine.writer.finish()

    def load(self, folder: str, how: str) -> dict[str, torch.Tensor]:
        self.learner.load(Path(folder), how)
        return self.weights()

    def convert(self, folder: str) -> None:
        self.learner.engine.convert(Path(folder))

    def updates_done(self) -> int:
        return self.learner.engine.updates_done

    def held_back(self, folder: str) -> tuple[dict, dict]:
        """A snapshot whose write waits until two more steps are trained. (weights at the snapshot, at the end)."""
        writer, gate = self.learner.engine.writer, threading.Event()
        writer.background = True
        writer.submit(lambda: [] if gate.wait(60) else [])
        then = {name: value.clone() for name, value in self.weights().items()}
        self.learner.snapshot(Path(folder), self.tokenizer())
        self.train()
        now = self.train()
        gate.set()
        files = writer.finish()
        writer.background = False
        assert all(path.stat().st_size == known["size"] for path, known in files.items())
        return then, now

    def full_disk(self, folder: str, full_on: int) -> tuple[str, list[str]]:
        """What `finish` says after a snapshot with no room on one rank; then a step, and a snapshot that fits."""
        writer, (_, hard) = self.learner.engine.writer, resource.getrlimit(resource.RLIMIT_FSIZE)
        writer.background, said = True, ""
        if self.rank == full_on:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        self.learner.snapshot(Path(folder) / "first", self.tokenizer())
        try:
            writer.finish()
        except CheckpointError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        self.train()
        self.learner.snapshot(Path(folder) / "second", self.tokenizer())
        files = writer.finish()
        writer.background = False
        return said, sorted(path.relative_to(folder).as_posix() for path in files)


class World:
    """So many ranks, called together."""

    def __init__(self, size: int):
        import ray

        from rlpipe.cluster import wait

        here = str(Path(__file__).parent)
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": here}
        actor = ray.remote(Rank).options(runtime_env={"env_vars": environment})
        self.ranks = [actor.remote(rank, size, here) for rank in range(size)]
        master = wait([self.ranks[0].address.remote()], what="test rank 0", timeout_s=120)[0]
        self.all("join", master)

    def all(self, method: str, *arguments) -> list:
        from rlpipe.cluster import wait

        calls = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        return wait(calls, what=f"{method} in the test", timeout_s=240)

    def first(self, method: str, *arguments):
        from rlpipe.cluster import wait

        return wait([getattr(self.ranks[0], method).remote(*arguments)], what=f"{method} in the test", timeout_s=240)[0]


@pytest.fixture(scope="module")
def worlds(ray_session):
    import ray

    made = {size: World(size) for size in (1, 2)}
    yield made
    for world in made.values():
        for rank in world.ranks:
            ray.kill(rank)


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


@pytest.mark.parametrize("kind, stage", [("policy", 0), ("value", 1), ("lagged", 2), ("lora", 3)])
def test_two_ranks_then_one_then_two_equal_two_throughout(worlds, tmp_path, kind, stage):
    from rlpipe.checkpoint.fitting import UNIVERSAL, way_to_load

    worlds[2].all("make", kind, stage)
    worlds[2].all("train")
    worlds[2].all("save", str(tmp_path / "a"))
    whole = [worlds[2].all("train")[0], worlds[2].all("train")[0]]
    for leg, (before, now, folder) in enumerate([(2, 1, "a"), (1, 2, "b")]):
        shapes = [{"workers": workers, "zero_stage": stage} for workers in (before, now)]
        how = way_to_load(*shapes)
        worlds[now].all("make", kind, stage)
        if how == UNIVERSAL:
            worlds[now].first("convert", str(tmp_path / folder))
        worlds[now].all("load", str(tmp_path / folder), how)
        assert worlds[now].first("updates_done") == 4 * (leg + 1)
        trained = worlds[now].all("train")[0]
        assert gap(trained, whole[leg]) <= 1e-5
        worlds[now].all("save", str(tmp_path / "b"))


@pytest.mark.parametrize("kind, before, after", [("lora", 1, 3), ("value", 3, 0), ("policy", 0, 2)])
def test_between_other_stages_the_weights_are_kept_and_the_optimizer_is_fresh(worlds, tmp_path, kind, before, after):
    from rlpipe.checkpoint.fitting import EXPORT

    worlds[2].all("make", kind, before)
    then = worlds[2].all("train")[0]
    worlds[2].all("save", str(tmp_path))
    worlds[1].all("make", kind, after)
    assert gap(worlds[1].all("load", str(tmp_path), EXPORT)[0], then) <= 1e-7
    assert worlds[1].first("updates_done") == 4
    trained, usual = worlds[1].all("train")[0], worlds[2].all("train")[0]
    assert 1e-5 < gap(trained, usual), "moments begin anew"
    assert gap(trained, then) < 0.1, "and training goes on from the weights, masters included"


def test_zero_1_and_2_read_each_other(worlds, tmp_path):
    worlds[2].all("make", "policy", 1)
    worlds[2].all("train")
    worlds[2].all("save", str(tmp_path))
    whole = worlds[2].all("train")[0]
    worlds[1].all("make", "policy", 2)
    worlds[1].first("convert", str(tmp_path))
    worlds[1].all("load", str(tmp_path), "universal")
    assert gap(worlds[1].all("train")[0], whole) <= 1e-5


@pytest.mark.parametrize("kind, stage", [("lagged", 1), ("lora", 3), ("value", 2)])
def test_what_is_written_late_is_the_state_of_the_snapshot(worlds, tmp_path, kind, stage):
    from rlpipe.models.loading import load_model

    worlds[2].all("make", kind, stage)
    worlds[2].all("train")
    then, now = worlds[2].all("held_back", str(tmp_path))[0]
    assert gap(then, now) > 1e-4
    worlds[2].all("make", kind, stage)
    assert gap(worlds[2].all("load", str(tmp_path), "plain")[0], then) == 0.0
    again = [worlds[2].all("train")[0], worlds[2].all("train")[0]][1]
    assert gap(again, now) == 0.0, "optimizer and counters too: it goes on bit for bit"
    exported = load_model(tmp_path / ("value_model" if kind == "value" else "model"))
    then.pop("head", None)
    assert gap(dict(exported.lm.named_parameters()), then) == 0.0


@pytest.mark.parametrize("full_on", [0, 1])
def test_a_full_disk_on_one_rank_is_its_failure_and_training_goes_on(worlds, tmp_path, full_on):
    worlds[2].all("make", "policy", 3)
    replies = worlds[2].all("full_disk", str(tmp_path), full_on)
    for rank, (said, files) in enumerate(replies):
        assert (f"rank {rank}'s part of the checkpoint could not be written" in said) == (rank == full_on)
        assert f"second/learner/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in files
    assert {"second/model/model.safetensors", "second/model/config.json", "second/learner.json"} <= set(replies[0][1])


def test_a_copy_owns_its_tensors_and_keeps_what_is_shared():
    from collections import OrderedDict, namedtuple

    from rlpipe.learner.snapshot import host_copy

    Pair = namedtuple("Pair", "first second")
    buffer = torch.arange(8.0)
    view, tied = buffer[2:4], torch.nn.Parameter(torch.ones(3))
    state = {"a": [view, (tied, 5)], "pair": Pair(tied, "x"), "shape": torch.Size([2]), "more": OrderedDict(z=tied)}
    held = host_copy(state)
    buffer.zero_()
    with torch.no_grad():
        tied.zero_()
    assert held["a"][0].tolist() == [2.0, 3.0] and held["a"][0].untyped_storage().nbytes() == 8
    assert held["a"][1][0] is held["pair"].first is held["more"]["z"] and held["pair"].first.tolist() == [1.0] * 3
    assert type(held["pair"]) is Pair and type(held["more"]) is OrderedDict and held["shape"] == torch.Size([2])
