"""DeepSpeed against plain torch: losses, gradients and parameters, at every ZeRO stage, number of ranks and packing."""

import numpy as np
import pytest
import torch

from rlpipe.config import AlgoConfig, LearnerConfig, ValueConfig
from rlpipe.learner.engine import learning_rate

pytestmark = pytest.mark.timeout(600)
LEARNER = dict(lr=1e-3, betas=[0.9, 0.95], eps=1e-5, grad_clip=0.5, threads=1)
ALGO = dict(kl_coef=0.05, normalizer="row_mean")


def experience(kind: str, **algo):
    """A step of four updates."""
    from test_learner_samples import step_plan

    return step_plan(kind, count=16, updates=4, group=4, **ALGO | algo)[0]


def objective_of(**algo):
    from rlpipe.objectives.objective import build_objective

    return build_objective(AlgoConfig(**ALGO | algo), 10)


def plain_torch(kind: str, **algo) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """The published way, as an oracle: one sample at a time, each row with a clean copy of its own under a dense mask,
    autograd, clip, AdamW. Returns losses, norms and parameters."""
    from tiny_models import tiny

    from rlpipe.learner.batches import Batches

    plan = experience(kind, **algo)
    model = fresh(tiny(kind)[0])
    start = fresh(model)
    objective = objective_of(**algo)
    batches = Batches(plan.samples, model.spec, torch.device("cpu"))
    with torch.no_grad():
        old = [logp_of(model, sample) for sample in plan.samples]
        reference = [logp_of(start, sample) for sample in plan.samples] if objective.needs_reference else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    losses, norms = [], []
    for update in plan.updates:
        optimizer.zero_grad()
        total = 0.0
        for index in update:
            referred = reference[index] if reference else None
            terms = objective.loss(logp_of(model, plan.samples[index]), old[index], batches.entries([index]), ref_logp=referred)
            terms.loss.backward()
            total += float(terms.loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(total)
    return losses, norms, [p.detach().clone() for p in model.lm.parameters()]


def fresh(model):
    """A copy: cached test models must not be trained."""
    import copy

    return copy.deepcopy(model)


def logp_of(model, sample) -> torch.Tensor:
    """Log-probabilities of a sample, row by row."""
    from rlpipe.models.packed_attention import dense_plan
    from rlpipe.models.packing import make_piece, pack

    found = []
    for row in range(len(sample.scored)):
        if not sample.scored[row].any():
            continue
        one = slice(row, row + 1)
        piece = make_piece(
            sample.prompt_ids, sample.response_ids, sample.masked[one], sample.scored[one],
            block_size=sample.block_size, mask_id=model.spec.mask_token_id,
        )  # fmt: skip
        batch = pack([piece], [piece.slot])
        logp, _ = model(batch.input_ids, batch.position_ids, dense_plan(batch.tags), batch.index, batch.targets)
        found.append(logp[batch.slot.argsort()])
    return torch.cat(found)


class Rank:
    """A learner rank that trains the test's experience under several configurations, one after the other."""

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

    def train(self, kind: str, stage: int, budget: int, checkpointing: bool, algo: dict):
        from test_learner import experience, learner_of

        from rlpipe.learner.micro_batches import make_shards

        plan = experience(kind, **algo)
        learner = learner_of(kind, self.world, stage, budget, checkpointing, **algo)
        shard = make_shards(plan.samples, plan.updates, [], budget, self.world)[self.rank]
        found = learner.train(shard, 1)
        return found["updates"], self.weights(learner), gap_of(found)

    def adapters(self, folder: str):
        """LoRA: the base frozen, its merged export, and a resumed copy that goes on alike."""
        from pathlib import Path

        from test_learner import experience, learner_of

        from rlpipe.learner.micro_batches import make_shards

        algo = {"kl_reference": "initial"}
        plan = experience("block", **algo)
        shard = make_shards(plan.samples, plan.updates, [], 200, self.world)[self.rank]
        runs = []
        for resumed in (False, True):
            learner = learner_of("block", self.world, 1, 200, False, lora=4, **algo)
            if resumed:
                learner.load(Path(folder))
            else:
                first = self.weights(learner)
                learner.train(shard, 1)
                learner.save(Path(folder))
            runs.append((learner.train(shard, 1)["updates"], self.weights(learner)))
        trainable = sum(p.numel() for p in learner.engine.model.parameters() if p.requires_grad)
        return first, runs, trainable, learner.engine.model.lm.config.hidden_size

    def values(self, folder: str):
        """A value model: zero at first, trained towards its returns, resumed."""
        import dataclasses
        from pathlib import Path

        from test_learner import LEARNER, experience, fresh
        from tiny_models import tiny

        from rlpipe.learner.micro_batches import make_shards
        from rlpipe.learner.value import ValueLearner
        from rlpipe.models.value import ValueModel

        plan = experience("block")
        samples = [dataclasses.replace(s, returns=s.rollout_logp * 0 + float(np.sign(s.advantage[0]))) for s in plan.samples]
        shard = make_shards(samples, plan.updates, [], 200, self.world)[self.rank]

        def make():
            config = LearnerConfig(zero_stage=1, workers=self.world, **LEARNER)
            return ValueLearner(ValueModel(fresh(tiny("block")[0])), ValueConfig(lr=3e-3), config, 40)

        learner = make()
        first = learner.score(shard)
        losses = [learner.train(shard, 1)[0]["sums"]["value_loss"]]
        for _ in range(6):
            learner.score(shard)
            losses.append(learner.train(shard, 1)[0]["sums"]["value_loss"])
        learner.save(Path(folder))
        resumed = make()
        resumed.load(Path(folder))
        pair = []
        for one in (learner, resumed):
            one.score(shard)
            one.train(shard, 1)
            pair.append(np.concatenate(one.score(shard)))
        return np.concatenate(first), losses, pair

    def weights(self, learner) -> dict:
        from rlpipe.models.weights import tensor_of

        weights = {}
        for bucket, entries in learner.engine.export(20_000):
            weights.update((entry.name, tensor_of(entry, bucket)) for entry in entries)
        return weights


def gap_of(found) -> float:
    return float(np.abs(found["learner"] - found["rollout"]).max())


def learner_of(kind: str, world: int, stage: int, budget: int, checkpointing: bool, lora: int = 0, **algo):
    from tiny_models import tiny

    from rlpipe.learner.policy import PolicyLearner
    from rlpipe.models.adapters import add_adapters

    config = LearnerConfig(
        zero_stage=stage, token_budget=budget, workers=world, activation_checkpointing=checkpointing, **LEARNER
    )
    model = fresh(tiny(kind)[0])
    if lora:
        add_adapters(model.lm, rank=lora, alpha=8.0, dropout=0.0, targets=["q_proj", "down_proj"])
    return PolicyLearner(model, objective_of(**algo), config, 1.0, 4)


@pytest.fixture(scope="module", params=(1, 2))
def ranks(request, ray_session):
    import pathlib

    import ray

    from rlpipe.cluster import wait

    here = str(pathlib.Path(__file__).parent)
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": here}
    actor = ray.remote(Rank).options(runtime_env={"env_vars": environment})
    workers = [actor.remote(rank, request.param, here) for rank in range(request.param)]
    master = wait([workers[0].address.remote()], what="test rank 0", timeout_s=60)[0]
    wait([worker.join.remote(master) for worker in workers], what="test ranks", timeout_s=120)
    yield workers
    for worker in workers:
        ray.kill(worker)


ORACLES: dict = {}


def oracle(kind: str, algo: dict):
    key = (kind, *sorted(algo.items()))
    if key not in ORACLES:
        ORACLES[key] = plain_torch(kind, **algo)
    return ORACLES[key]


SEQUENCE = {"ratio": "sequence", "clip_low": 0.5, "clip_high": 0.5}
REFERENCE = {"kl_reference": "initial", "kl_estimator": "k3"}
CONFIGURATIONS = [
    ("block", 0, 60, False, {}), ("block", 1, 200, False, {}), ("block", 2, 60, False, {}), ("block", 3, 10_000, False, {}),
    ("block", 1, 60, True, {}), ("full", 1, 50, False, {}), ("full", 2, 10_000, False, {}), ("full", 3, 50, False, {}),
    ("block", 1, 60, False, SEQUENCE), ("full", 2, 60, False, SEQUENCE),
    ("block", 1, 60, False, REFERENCE), ("full", 3, 60, False, REFERENCE),
]  # fmt: skip


@pytest.mark.parametrize("kind, stage, budget, checkpointing, algo", CONFIGURATIONS)
def test_four_updates_equal_plain_torch(ranks, kind, stage, budget, checkpointing, algo):
    from rlpipe.cluster import wait
    from rlpipe.learner.engine import merge_sums

    losses, norms, parameters = oracle(kind, algo)
    calls = [worker.train.remote(kind, stage, budget, checkpointing, algo) for worker in ranks]
    replies = wait(calls, what="training in the test", timeout_s=120)
    for number in range(4):
        sums: dict[str, float] = {}
        for results, _, _ in replies:
            merge_sums(sums, results[number]["sums"])
        assert sums["loss"] == pytest.approx(losses[number], abs=1e-6)
        assert replies[0][0][number]["grad_norm"] == pytest.approx(norms[number], abs=2e-6, rel=1e-5)
    weights = list(replies[0][1].values())
    assert max(float((a - b).abs().max()) for a, b in zip(parameters, weights, strict=True)) <= 1e-6
    assert max(reply[2] for reply in replies) <= 1e-5  # replay equals rollout in every rank's pass
    assert all(not reply[1] for reply in replies[1:])


def test_adapters_train_alone_export_merged_and_resume(ranks, tmp_path):
    from tiny_models import tiny

    from rlpipe.cluster import wait

    replies = wait([worker.adapters.remote(str(tmp_path)) for worker in ranks], what="adapters in the test", timeout_s=120)
    first, runs, trainable, width = replies[0]
    plain = dict(tiny("block")[0].lm.named_parameters())
    assert first.keys() == plain.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in plain.items()), "adapters start as nothing"
    assert trainable == 2 * (4 * (width + width) + 4 * (64 + width))
    (updates, weights), (resumed_updates, resumed) = runs
    moved = {name for name in plain if not torch.equal(weights[name], plain[name])}
    assert moved == {name for name in plain if "q_proj" in name or "down_proj" in name}
    assert updates == resumed_updates
    assert all(torch.equal(weights[name], resumed[name]) for name in plain), "a resumed run goes on bit for bit"


def test_a_value_model_starts_at_zero_learns_its_returns_and_resumes(ranks, tmp_path):
    from rlpipe.cluster import wait

    for first, losses, (kept, resumed) in wait(
        [worker.values.remote(str(tmp_path)) for worker in ranks], what="values in the test", timeout_s=120
    ):
        assert not first.any()
        assert losses[-1] < 0.7 * losses[0]
        assert np.array_equal(kept, resumed)


def test_learning_rates():
    config = LearnerConfig(lr_warmup=4, lr_schedule="constant")
    assert [learning_rate(config, 1.0, i, 10) for i in (0, 3, 4, 9, 50)] == [0.25, 1.0, 1.0, 1.0, 1.0]
    config.lr_schedule = "linear"
    assert [learning_rate(config, 1.0, i, 8) for i in (4, 6, 8, 9)] == [1.0, 0.5, 0.0, 0.0]
    config.lr_schedule = "cosine"
    assert [learning_rate(config, 1.0, i, 8) for i in (4, 6, 8)] == pytest.approx([1.0, 0.5, 0.0])
    config.lr_floor = 0.2
    assert [learning_rate(config, 1.0, i, 8) for i in (4, 6, 8)] == pytest.approx([1.0, 0.6, 0.2])


def test_an_update_without_any_gradient_has_norm_zero():
    """Without ZeRO DeepSpeed keeps no norm; ours is a tensor, and 0 is a number too."""
    from types import SimpleNamespace

    from rlpipe.learner.engine import Engine

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    engine = Engine.__new__(Engine)
    engine.config, engine.lr, engine.total_updates, engine.updates_done, engine.world = (
        LearnerConfig(zero_stage=0),
        1.0,
        1,
        0,
        1,
    )

    class Module:
        global_steps, module = 0, SimpleNamespace(parameters=lambda: [parameter])
        optimizer = SimpleNamespace(param_groups=[{}])

        def step(self):
            self.global_steps += 1

        def nothing(self, *arguments):
            return None

        backward = set_gradient_accumulation_boundary = get_global_grad_norm = nothing

    engine.module = Module()
    assert engine.update([[0]], lambda batch: (torch.zeros(()), {}))["grad_norm"] == 0.0
