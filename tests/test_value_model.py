"""The value model on a toy whose return can be read off the state: it must come to explain it."""

import copy

import numpy as np
import torch

from rlpipe.config import AlgoConfig, DecoderConfig, ModelConfig
from rlpipe.learner.batches import Batches
from rlpipe.learner.credit import with_values
from rlpipe.learner.step import plan_step
from rlpipe.models.tiny import build_tiny
from rlpipe.models.value import ValueModel
from rlpipe.objectives.objective import build_objective
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.request import Request

GROUPS, SAMPLES, TOKENS = 16, 8, 4


def experience(model, tokenizer, rng, step: int):
    """Responses from left to right; the reward is whether the first token is a 1, so that every later state shows it."""
    decoder = Decoder.resolve(DecoderConfig(max_tokens=TOKENS, score="left_to_right"), model.spec)
    requests = []
    for group in range(GROUPS):
        prompt = np.array(tokenizer("".join(rng.choice(list("1234_"), 4)))["input_ids"], np.int32)
        for sample in range(SAMPLES):
            seed = int(rng.integers(2**40))
            requests.append(Request(prompt_ids=prompt, uid=f"{step}/{group}", sample=sample, seed=seed))
    records = list(Engine(model).sample(requests, decoder=decoder, version=0)[0])
    one = tokenizer("1")["input_ids"][0]
    return records, np.array([float(record.response_ids[0] == one) for record in records])


def test_a_return_that_the_state_shows_is_explained():
    model, tokenizer = build_tiny(ModelConfig(path="tiny:block", layers=2, width=32, heads=2, mlp=64), "1234_", 0)
    value = ValueModel(copy.deepcopy(model))
    optimizer = torch.optim.AdamW([p for p in value.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.95))
    objective, rng, explained = build_objective(AlgoConfig(), TOKENS), np.random.default_rng(0), []
    for step in range(25):
        records, rewards = experience(model, tokenizer, rng, step)
        relative = np.concatenate([objective.advantages(part) for part in rewards.reshape(GROUPS, SAMPLES)])
        plan = plan_step(records, relative, objective, updates=1, gauge_trajectories=0, rng=rng)
        batch = Batches(plan.samples, model.spec, torch.device("cpu")).packed(range(len(plan.samples)))

        def values():
            found = value(batch.input_ids, batch.position_ids, batch.plan(), batch.index)  # noqa: B023
            return found[batch.slot.argsort()]  # noqa: B023

        sizes = [sample.num_scored for sample in plan.samples]
        known = [part.numpy() for part in values().detach().split(sizes)]
        valued, metrics = with_values(plan, records, relative, known, gamma=1.0, lam=1.0, shrink=1, gate=0.0)
        explained.append(metrics["value/explained_variance"])
        returns = torch.from_numpy(np.concatenate([sample.returns for sample in valued.samples]))
        for _ in range(4):
            optimizer.zero_grad()
            (0.5 * (values() - returns).square().mean()).backward()
            optimizer.step()
    assert explained[0] == 0.0  # the head starts at zero
    assert np.mean(explained[-5:]) > 0.5, explained  # three of four tokens are scored where the first is seen
