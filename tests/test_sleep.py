"""Taking turns: a rollout worker that gives its weights away, a learner that moves to the host; nothing changes but memory."""

import copy
import gc
import threading

import numpy as np
import pytest
import torch
from tiny_models import prompts, tiny

from rlpipe.config import DecoderConfig
from rlpipe.learner.offloading import Offload, storages_of, tensors_of
from rlpipe.rollout import sleep
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.request import Request

CPU = torch.device("cpu")


def bytes_of(model) -> int:
    return sum({p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}.values())


@pytest.mark.parametrize("kind", ("block", "full"))
def test_a_rollout_worker_sleeps_without_weights_and_wakes_for_new_ones(kind):
    model, tokenizer = copy.deepcopy(tiny(kind)[0]), tiny(kind)[1]
    engine = Engine(model)
    requests = [Request(prompt_ids=ids, uid=f"p{i}", sample=0, seed=i) for i, ids in enumerate(prompts(tokenizer, 4))]
    decoder = Decoder.resolve(DecoderConfig(max_tokens=12), model.spec)

    def responses() -> list[np.ndarray]:
        found, _ = engine.sample(requests, decoder=decoder, version=0)
        return [trajectory.response_ids for trajectory in found]

    before, weights = responses(), {name: p.detach().clone() for name, p in model.named_parameters()}
    held = bytes_of(model)
    assert engine.spare is not None
    assert sleep.sleep(engine) > held, "the weights and the cache"
    assert bytes_of(model) == 0 and engine.spare is None
    assert sleep.sleep(engine) == 0
    assert sleep.wake(engine) == held == bytes_of(model)
    assert all(bool(p.isnan().all()) for p in model.parameters()), "nothing to sample from by mistake"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    assert all(np.array_equal(a, b) for a, b in zip(before, responses(), strict=True))
    assert sleep.wake(engine) == 0, "who is awake keeps its weights"
    assert not any(bool(p.isnan().any()) for p in model.parameters())


def test_tensors_are_found_wherever_they_are_kept():
    class Slotted:
        __slots__ = ("inside",)

        def __init__(self, inside):
            self.inside = inside

    class Owner:
        pass

    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad, weight.shard = torch.ones(3), torch.zeros(5)
    owner = Owner()
    owner.state, owner.me = {weight: {"exp_avg": torch.zeros(4)}}, owner
    owner.all = (Slotted(torch.zeros(6)), [{1: torch.zeros(7)}])
    assert sorted(t.numel() for t in tensors_of(owner)) == [3, 3, 4, 5, 6, 7]


def test_views_stay_views_and_what_is_kept_stays():
    flat = torch.arange(10.0)
    owner = {"flat": flat, "views": [flat[:4], flat[4:].view(2, 3)], "other": torch.ones(5), "scalar": 3}
    offload = Offload()
    assert offload.sleep(owner, CPU, keep=owner["other"]) == 40 and offload.asleep
    assert flat.untyped_storage().nbytes() == 0 and owner["other"].sum() == 5
    assert offload.sleep(owner, CPU) == 20, "what was kept follows"
    assert offload.wake() == 60 and not offload.asleep and offload.wake() == 0
    owner["views"][1][0, 0] = 99.0
    assert flat[4] == 99.0 and owner["views"][0].tolist() == [0, 1, 2, 3] and owner["other"].sum() == 5
    assert sorted(storage.nbytes() for storage in storages_of(owner, CPU)) == [20, 40]


class Rank:
    """A learner rank that trains twice, with and without a sleep between the steps."""

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

    def train_twice(self, stage: int, lora: int, sleeping: bool):
        """(weights after it, bytes freed, what is left of the learner while it sleeps)."""
        from test_learner import experience, learner_of

        from rlpipe.learner.micro_batches import make_shards

        algo = {"kl_reference": "lagged", "kl_estimator": "k3"}
        plan = experience("block", **algo)
        shard = make_shards(plan.samples, plan.updates, [], 200, self.world)[self.rank]
        before = {tensor.untyped_storage()._cdata for tensor in live_tensors()}
        learner = learner_of("block", self.world, stage, 200, False, lora=lora, **algo)
        learner.train(shard, 1)
        freed, left = 0, 0
        if sleeping:
            offload = Offload()
            freed = offload.sleep(learner, CPU, keep=list(learner.engine.model.parameters()))
            freed += offload.sleep(learner, CPU)
            hosts = {host._cdata for _, host in offload._held.values()}
            storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in live_tensors()}
            left = sum(nbytes for key, nbytes in storages.items() if key not in before | hosts)
            assert offload.wake() == freed
        learner.train(shard, 1)
        weights = {}
        for name, tensor in learner.engine.stream():
            weights[name] = tensor.clone().numpy()
        return weights, freed, left


def live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and found.device == CPU]


@pytest.fixture(scope="module")
def ranks(ray_session):
    import pathlib

    import ray

    from rlpipe.cluster import wait

    here = str(pathlib.Path(__file__).parent)
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": here}
    actor = ray.remote(Rank).options(runtime_env={"env_vars": environment})
    workers = [actor.remote(rank, 2, here) for rank in range(2)]
    master = wait([workers[0].address.remote()], what="test rank 0", timeout_s=120)[0]
    wait([worker.join.remote(master) for worker in workers], what="test ranks", timeout_s=120)
    yield workers
    for worker in workers:
        ray.kill(worker)


@pytest.mark.parametrize("stage, lora", [(0, 0), (1, 0), (2, 0), (3, 0), (1, 4)])
def test_a_learner_that_slept_goes_on_to_the_bit(ranks, stage, lora):
    from rlpipe.cluster import wait

    found = []
    for sleeping in (False, True):
        calls = [worker.train_twice.remote(stage, lora, sleeping) for worker in ranks]
        found.append(wait(calls, what="training in the test", timeout_s=120)[0])
    (straight, _, _), (slept, freed, left) = found
    assert straight.keys() == slept.keys() and straight
    assert all(np.array_equal(straight[name], slept[name]) for name in straight)
    nbytes = sum(weight.nbytes for weight in straight.values())
    assert freed > (1.5 if stage == 3 or lora else 3) * nbytes, "weights, optimizer and the reference at least"
    assert left < 0.02 * freed, f"{left} of {freed} bytes are left"


@pytest.mark.gpu
def test_memory_of_a_gpu_is_given_back():
    device = torch.device("cuda", 0)
    owner = {"weights": torch.ones(2**26, device=device), "state": [torch.full((2**26,), 2.0, device=device)]}
    free = torch.cuda.mem_get_info(device)[0]
    offload = Offload()
    assert offload.sleep(owner, device) == 2**29
    assert torch.cuda.mem_get_info(device)[0] - free > 0.95 * 2**29
    assert offload.wake() == 2**29
    assert bool((owner["weights"] == 1).all()) and bool((owner["state"][0] == 2).all())


def test_a_learner_that_sleeps_does_not_take_along_what_is_being_written(tmp_path):
    """Some models have buffers that belong to their files, and those leave the device with the rest."""
    from safetensors.torch import load_file
    from test_transport import PlainEngine

    from rlpipe.learner.policy import PolicyLearner
    from rlpipe.learner.snapshot import Writer

    model, tokenizer = tiny("block")
    model = copy.deepcopy(model)
    model.lm.register_buffer("bias", torch.arange(8.0))
    learner = object.__new__(PolicyLearner)
    learner.engine = PlainEngine(model)
    learner.engine.writer = writer = Writer(0)
    writer.background, gate = True, threading.Event()
    writer.submit(lambda: [] if gate.wait(30) else [])
    learner.snapshot_model(tmp_path / "model", tokenizer)
    offload = Offload()
    assert offload.sleep(model, CPU) > 0
    gate.set()
    files = writer.finish()
    offload.wake()
    (weights,) = (path for path in files if path.suffix == ".safetensors")
    assert torch.equal(load_file(weights)["bias"], torch.arange(8.0))
