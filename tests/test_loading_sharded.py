"""ZeRO 3 from the first byte on: a model that is loaded in shards is the one that is loaded whole, and trains like it."""

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.timeout(600)
REFERENCE = {"kl_reference": "initial", "kl_estimator": "k3", "kl_coef": 0.05}


class Rank:
    """Loads folders in shards and whole, one after the other."""

    def __init__(self, rank: int, world: int):
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

    def config(self, **settings):
        from test_learner import LEARNER

        from rlpipe.config import LearnerConfig

        return LearnerConfig(zero_stage=3, workers=self.world, token_budget=60, **LEARNER, **settings)

    def load(self, folder: str, dtype: str):
        """(names that are not shards, share of the parameters held here, weights on rank 0, buffers)."""
        from rlpipe.learner.sharding import Partitioned, whole_size
        from rlpipe.models import loading

        loading.BUCKET_BYTES = 5_000  # several buckets
        partitioning = Partitioned(self.config())
        model = loading.load_model(folder, dtype, partitioning=partitioning)
        named = list(model.lm.named_parameters())
        whole = [name for name, p in named if p.numel()]
        held = sum(p.ds_tensor.numel() for _, p in named) / sum(whole_size(p) for _, p in named)
        weights = {}
        for name, parameter in named:
            with partitioning.gathered([parameter]):
                weights[name] = parameter.detach().clone()
        return whole, held, weights if self.rank == 0 else {}, dict(model.lm.named_buffers())

    def train(self, folder: str, sharded: bool, algo: dict, lora: int, offload: bool):
        from test_learner import experience, objective_of

        from rlpipe.learner.micro_batches import make_shards
        from rlpipe.learner.policy import PolicyLearner
        from rlpipe.learner.sharding import Partitioned
        from rlpipe.models.adapters import add_adapters
        from rlpipe.models.loading import load_model

        plan, config = experience("block", **algo), self.config(offload=offload)
        model = load_model(folder, partitioning=Partitioned(config) if sharded else None)
        if lora:
            add_adapters(model.lm, rank=lora, alpha=8.0, dropout=0.0, targets=["q_proj", "down_proj"])
        learner = PolicyLearner(model, objective_of(**algo), config, 1.0, 4)
        shard = make_shards(plan.samples, plan.updates, [], 60, self.world)[self.rank]
        return learner.train(shard, 1)["updates"], learner.engine.state()

    def save(self, folder: str, target: str):
        """Write a checkpoint's model folder, and one where that is not possible; the error's name on rank 0."""
        from pathlib import Path

        from test_learner import objective_of

        from rlpipe.errors import CheckpointError
        from rlpipe.learner.policy import PolicyLearner
        from rlpipe.learner.sharding import Partitioned
        from rlpipe.models.loading import load_model, load_tokenizer

        model = load_model(folder, partitioning=Partitioned(self.config()))
        learner = PolicyLearner(model, objective_of(), self.config(), 1.0, 4)
        learner.save_model(Path(target), load_tokenizer(folder))
        try:
            learner.save_model(Path(folder) / "config.json" / "x", load_tokenizer(folder))
        except CheckpointError as error:
            return str(error)
        return ""

    def value(self, folder: str, sharded: bool):
        import dataclasses

        from test_learner import experience

        from rlpipe.config import ValueConfig
        from rlpipe.learner.micro_batches import make_shards
        from rlpipe.learner.sharding import Partitioned
        from rlpipe.learner.value import ValueLearner
        from rlpipe.models.loading import load_model
        from rlpipe.models.value import ValueModel

        plan = experience("block")
        samples = [dataclasses.replace(s, returns=s.rollout_logp * 0 + float(np.sign(s.advantage[0]))) for s in plan.samples]
        shard = make_shards(samples, plan.updates, [], 60, self.world)[self.rank]
        model = load_model(folder, partitioning=Partitioned(self.config()) if sharded else None)
        learner = ValueLearner(ValueModel(model), ValueConfig(lr=3e-3), self.config(), 40)
        learner.score(shard)
        learner.train(shard, 1)
        return np.concatenate(learner.score(shard))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tiny_models import tiny

    from rlpipe.models.loading import save_model

    path = tmp_path_factory.mktemp("sharded")
    save_model(*tiny("block"), path, shard_bytes=20_000)
    return str(path)


@pytest.fixture(scope="module")
def ranks(ray_session):
    import pathlib

    import ray

    from rlpipe.cluster import wait

    here = str(pathlib.Path(__file__).parent)
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": here}
    actor = ray.remote(Rank).options(runtime_env={"env_vars": environment})
    workers = [actor.remote(rank, 2) for rank in range(2)]
    master = wait([workers[0].address.remote()], what="test rank 0", timeout_s=60)[0]
    wait([worker.join.remote(master) for worker in workers], what="test ranks", timeout_s=120)
    yield workers
    for worker in workers:
        ray.kill(worker)


def on_all(ranks, method: str, *arguments):
    from rlpipe.cluster import wait

    calls = [getattr(worker, method).remote(*arguments) for worker in ranks]
    return wait(calls, what=f"{method} on the test ranks", timeout_s=120)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_hold_what_a_whole_model_holds(ranks, folder, dtype):
    from rlpipe.models.loading import load_model

    plain = load_model(folder, dtype).lm
    replies = on_all(ranks, "load", folder, dtype)
    for whole, held, _, buffers in replies:
        assert whole == [], "a parameter is whole on a rank"
        assert held == pytest.approx(0.5, abs=0.01)
        assert buffers.keys() == dict(plain.named_buffers()).keys()
        for name, buffer in plain.named_buffers():
            assert torch.equal(buffers[name], buffer) and buffers[name].dtype == torch.float32, name
    weights = replies[0][2]
    assert weights.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(weights[name], parameter) and weights[name].dtype == parameter.dtype, name


@pytest.mark.parametrize("algo, lora, offload", [({}, 0, False), ({}, 0, True), (REFERENCE, 0, False), ({}, 4, False)])
def test_a_sharded_model_trains_like_a_whole_one(ranks, folder, algo, lora, offload):
    whole, sharded = (on_all(ranks, "train", folder, flag, algo, lora, offload) for flag in (False, True))
    for (updates, weights), (other_updates, other_weights) in zip(whole, sharded, strict=True):
        assert updates == other_updates
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_experts_and_router_corrections_arrive_too(ranks, tmp_path):
    from plain_architectures import PLAIN
    from test_families import write

    from rlpipe.models.loading import load_model

    folder = str(write(tmp_path, PLAIN["llada2"]))
    plain = load_model(folder, "bfloat16").lm
    replies = on_all(ranks, "load", folder, "bfloat16")
    for whole, _, _, buffers in replies:
        assert whole == []
        for name, buffer in plain.named_buffers():
            assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype == torch.float32, name
    for name, parameter in plain.named_parameters():
        assert torch.equal(replies[0][2][name], parameter), name


def test_shards_are_written_in_the_layout_that_was_read(ranks, tmp_path):
    from plain_architectures import PLAIN
    from safetensors.torch import load_file
    from test_families import write

    (tmp_path / "in").mkdir()
    folder = write(tmp_path / "in", PLAIN["llada2"])
    replies = on_all(ranks, "save", str(folder), str(tmp_path / "out"))
    assert "could not be written" in replies[0] and replies[1] == "", "and the other rank does not wait for ever"
    published, saved = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in published.items())


def test_a_value_model_can_be_sharded_too(ranks, folder):
    for whole, sharded in zip(*(on_all(ranks, "value", folder, flag) for flag in (False, True)), strict=True):
        np.testing.assert_array_equal(whole, sharded)
        assert whole.any()
