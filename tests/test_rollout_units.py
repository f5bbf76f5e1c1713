"""Units of work: prompts of one block size together, every prompt once, the recipe's decoder unless a prompt says otherwise."""

import dataclasses
import itertools
import random

from rlpipe.config import RolloutConfig
from rlpipe.rollout.pool import RolloutPool, units_of_work
from rlpipe.rollout.worker import RolloutPart
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Prompt


class Workers:
    """Answers every request with the block size it was decoded in, one part a prompt, the last prompt of a unit first."""

    def submit(self, call, take, *, timeout_s, what, urgency):
        request = call.args[0]
        for place, prompt in reversed(list(enumerate(request.prompts))):
            text = f"{prompt.uid} in {request.decoder.block_size}"
            part = RolloutPart(place, [], (text,) * request.samples, EngineCounters())
            take(part, True)
            take(part, True)  # a unit that is tried again gives its parts again
        take(None, False)

    def cancel(self, ticket, abort):
        pass


def generate(sizes, samples=2, batch_size=4, recipe=0, decoder=None):
    pool = object.__new__(RolloutPool)
    pool.cfg, pool.seed, pool.pool = RolloutConfig(batch_size=batch_size), 0, Workers()
    pool.cfg.decoder.block_size = recipe
    pool.version, pool._units = 1, itertools.count(1)
    prompts = [Prompt(uid=str(i), task="t", text="q", block_size=size) for i, size in enumerate(sizes)]
    chosen = dataclasses.replace(pool.cfg.decoder, block_size=recipe if decoder is None else decoder)
    groups, _ = pool.generate(prompts, samples, chosen, what="test")
    assert [group.prompt for group in groups] == prompts
    return [group.texts for group in groups]


def test_units_of_work_share_a_block_size_and_hold_every_prompt_once():
    assert units_of_work([0] * 5, 2) == [(0, [0, 1]), (0, [2, 3]), (0, [4])]
    assert units_of_work([4, 8, 4, 4, 8], 2) == [(4, [0, 2]), (8, [1, 4]), (4, [3])]
    assert units_of_work([], 2) == []
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.choice((0, 4, 8)) for _ in range(rng.randrange(40))]
        units = units_of_work(sizes, 3)
        assert sorted(index for _, unit in units for index in unit) == list(range(len(sizes)))
        assert all(sizes[index] == size for size, unit in units for index in unit) and all(len(unit) <= 3 for _, unit in units)
        assert [unit[0] for _, unit in units] == sorted(unit[0] for _, unit in units)


def test_groups_come_back_in_the_order_of_their_prompts_each_in_its_blocks():
    sizes = [4, 8, 0, 4, 4, 0, 8]
    assert generate(sizes) == [[f"{i} in {size}"] * 2 for i, size in enumerate(sizes)]
    assert generate(sizes, recipe=16) == [[f"{i} in {size or 16}"] * 2 for i, size in enumerate(sizes)]


def test_a_decoder_that_was_given_another_block_size_keeps_it():
    assert generate([4, 8, 0], decoder=2) == [[f"{i} in 2"] * 2 for i in range(3)]
