"""DeepSpeed against plain torch: losses, gradients and parameters, at every ZeRO stage, number of ranks and packing."""

import numpy as np
import pytest
import torch

from rlpipe.config import AlgoConfig, LearnerConfig
from rlpipe.learner.engine import learning_rate
from rlpipe.models.packing import collate, pack_rows

pytestmark = pytest.mark.timeout(600)
LEARNER = dict(lr=1e-3, betas=[0.9, 0.95], eps=1e-5, grad_clip=0.5, threads=1)
ALGO = AlgoConfig(kl_coef=0.05, normalizer="row_mean")


def experience(kind: str):
    """(model, four optimizer updates of samples): two steps of two updates, on old log-probabilities made up a little."""
    from test_learner_samples import step_plan

    plan, _ = step_plan(kind, count=16, updates=4)
    return plan.samples, plan.updates


def plain_torch(kind: str) -> tuple[list[float], list[float], list[torch.Tensor]]:
    """The published way, as an oracle: one row at a time, autograd, clip, AdamW. Returns losses, norms and parameters."""
    from tiny_models import tiny

    from rlpipe.objectives.objective import build_objective

    samples, updates = experience(kind)
    model = fresh(tiny(kind)[0])
    objective = build_objective(ALGO, 10)
    old = {}
    with torch.no_grad():
        for index, sample in enumerate(samples):
            old[index] = torch.cat([logp for logp, _ in rows_of(model, sample)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    losses, norms = [], []
    for update in updates:
        optimizer.zero_grad()
        total = 0.0
        for index in update:
            sample, start = samples[index], 0
            for logp, count in rows_of(model, sample):
                part = slice(start, start + count)
                tensor = lambda name: torch.from_numpy(getattr(sample, name)[part].copy())  # noqa: B023, E731
                terms = objective.loss(
                    logp, old[index][part], tensor("advantage"), tensor("policy_weight"), tensor("kl_weight")
                )
                terms.loss.backward()
                total += float(terms.loss.detach())
                start += count
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(total)
    return losses, norms, [p.detach().clone() for p in model.lm.parameters()]


def fresh(model):
    """A copy: cached test models must not be trained."""
    import copy

    return copy.deepcopy(model)


def rows_of(model, sample):
    """Log-probabilities row by row, each with a clean copy of its own, no sharing between rows."""
    for row in range(len(sample.scored)):
        if not sample.scored[row].any():
            continue
        one = slice(row, row + 1)
        packs = pack_rows(
            sample.prompt_ids, sample.response_ids, sample.masked[one], sample.scored[one],
            block_size=sample.block_size, mask_id=model.spec.mask_token_id,
        )  # fmt: skip
        batch = collate(packs, [pack.slot for pack in packs], 0)
        logp, _ = model(batch.input_ids, batch.position_ids, batch.plan(), batch.index, batch.targets)
        yield logp[batch.slot.argsort()], len(logp)


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

    def train(self, kind: str, stage: int, budget: int, checkpointing: bool = False):
        from test_learner import ALGO, LEARNER, experience, fresh
        from tiny_models import tiny

        from rlpipe.learner.engine import DeepSpeedLearner
        from rlpipe.learner.samples import make_shards
        from rlpipe.objectives.objective import build_objective

        samples, updates = experience(kind)
        config = LearnerConfig(
            zero_stage=stage, token_budget=budget, workers=self.world, activation_checkpointing=checkpointing, **LEARNER
        )
        learner = DeepSpeedLearner(fresh(tiny(kind)[0]), build_objective(ALGO, 10), config, 1.0, 4)
        shard = make_shards(samples, updates, [], budget, self.world)[self.rank]
        gauge = learner.score(shard)
        results = learner.update(shard, 1)
        weights = {}
        from rlpipe.models.weights import tensor_of

        for bucket, entries in learner.export(20_000):
            weights.update((entry.name, tensor_of(entry, bucket)) for entry in entries)
        return results, weights, float(np.abs(gauge["learner"] - gauge["rollout"]).max())


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


@pytest.fixture(scope="module")
def oracles():
    return {kind: plain_torch(kind) for kind in ("block", "full")}


CONFIGURATIONS = [
    ("block", 0, 60, False), ("block", 1, 200, False), ("block", 2, 60, False), ("block", 3, 10_000, False),
    ("block", 1, 60, True), ("full", 1, 50, False), ("full", 2, 10_000, False), ("full", 3, 50, False),
]  # fmt: skip


@pytest.mark.parametrize("kind, stage, budget, checkpointing", CONFIGURATIONS)
def test_four_updates_equal_plain_torch(ranks, oracles, kind, stage, budget, checkpointing):
    from rlpipe.cluster import wait
    from rlpipe.learner.engine import merge_sums

    losses, norms, parameters = oracles[kind]
    calls = [worker.train.remote(kind, stage, budget, checkpointing) for worker in ranks]
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


def test_learning_rates():
    config = LearnerConfig(lr=1.0, lr_warmup=4, lr_schedule="constant")
    assert [learning_rate(config, i, 10) for i in (0, 3, 4, 9, 50)] == [0.25, 1.0, 1.0, 1.0, 1.0]
    config.lr_schedule = "linear"
    assert [learning_rate(config, i, 8) for i in (4, 6, 8, 9)] == [1.0, 0.5, 0.0, 0.0]
    config.lr_schedule = "cosine"
    assert [learning_rate(config, i, 8) for i in (4, 6, 8)] == pytest.approx([1.0, 0.5, 0.0])
