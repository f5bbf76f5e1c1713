"""Selectors and decoders by hand-worked cases and the published vectors."""

import math

import numpy as np
import pytest
import torch
from test_packing import replay
from tiny_models import prompts, sample, tiny

from rlpipe.config import DecoderConfig
from rlpipe.errors import ConfigError
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.selection import (
    SELECTORS,
    BlockAdaptive,
    Doubling,
    EntropyBounded,
    Factor,
    Hierarchical,
    LocalLeap,
    Static,
    StepView,
    Threshold,
)  # fmt: skip
from rlpipe.sampling.statistics import RowStatistics


def view(score, masked=None, entropy=None, block_step=0, settled=math.nan) -> StepView:
    score = torch.tensor(score, dtype=torch.float32)
    masked = torch.ones_like(score, dtype=torch.bool) if masked is None else torch.tensor(masked).bool()
    entropy = torch.zeros_like(score) if entropy is None else torch.tensor(entropy, dtype=torch.float32)
    statistics = RowStatistics(*[score] * 6, entropy)
    slots = len(score)
    return StepView(score, masked, statistics, torch.full((slots,), block_step), torch.full((slots,), float(settled)))


def chosen(selector, step: StepView) -> tuple[list, list]:
    commit, forced = selector(step)
    assert not (commit & ~step.masked).any() and not (forced & ~commit).any()
    assert (commit.any(-1) == step.masked.any(-1)).all(), "progress in every slot that has a mask"
    return commit.int().tolist(), forced.int().tolist()


def test_ties_go_to_the_lowest_position():
    step = view([[0.5, 0.9, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4]], [[1, 0, 1, 1], [1, 1, 1, 0]])
    assert chosen(Static(1), step)[0] == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert chosen(Threshold(0.9), step) == ([[0, 0, 1, 1], [0, 0, 1, 0]], [[0] * 4, [0, 0, 1, 0]])
    assert chosen(Threshold(0.3, 2), step) == ([[1, 0, 1, 1], [0, 1, 1, 0]], [[0] * 4, [0, 1, 0, 0]])
    assert chosen(Static(9), step)[0] == [[1, 0, 1, 1], [1, 1, 1, 0]]
    assert chosen(Static(1), view([[0.5, 0.6]], [[0, 0]]))[0] == [[0, 0]]


def test_threshold_is_the_reference_with_its_fallback():
    """LLaDA's get_transfer_index at confidence .9 and .995 (vector V10): the best one is taken when none passes."""
    logits = torch.tensor([[2.0, 0, 0], [5, 0, 0], [0, 1, 0.9], [0, 0, 3]])
    score = [logits.softmax(-1).amax(-1).tolist()]
    masked = [[1, 1, 1, 0]]
    assert chosen(Static(2), view(score, masked))[0] == [[1, 1, 0, 0]]
    assert chosen(Threshold(0.9), view(score, masked)) == ([[0, 1, 0, 0]], [[0, 0, 0, 0]])
    assert chosen(Threshold(0.995), view(score, masked)) == ([[0, 1, 0, 0]], [[0, 1, 0, 0]])
    negative_entropy = -torch.distributions.Categorical(logits=logits).entropy()
    # The reference's neg_entropy has the wrong sign and takes the least certain position; ours is the meant one.
    assert chosen(Static(2), view([negative_entropy.tolist()], masked))[0] == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    "score, commit",
    [
        ([0.9, 0.6, 0.3, 0.2], [1, 0, 0, 0]),  # (r+1)(1-p): .2, 1.2
        ([0.8, 0.9, 0.75, 0.1], [1, 1, 0, 0]),  # .2, .6, 1.0 is not below 1
        ([0.99, 0.99, 0.99, 0.99], [1, 1, 1, 1]),
        ([0.1, 0.2, 0.3, 0.2], [0, 0, 1, 0]),  # nothing passes: the best one, forced
    ],
)
def test_factor(score, commit):
    got, forced = chosen(Factor(1.0), view([score]))
    assert got == [commit] and (forced == [commit]) == (max(score) < 0.5)


def test_factor_stops_at_the_first_failure():
    assert chosen(Factor(1.0), view([[0.95, 0.6, 0.8]]))[0] == [[1, 0, 1]]


def test_entropy_bounded():
    step = view([[0.9, 0.8, 0.7, 0.6]], entropy=[[0.1, 0.2, 0.3, 0.9]])
    assert chosen(EntropyBounded(0.35), step)[0] == [[1, 1, 1, 0]]  # without the largest: 0, .1, .3, .6
    assert chosen(EntropyBounded(0.35, keep_largest=True), step)[0] == [[1, 1, 0, 0]]  # .1, .3, .6
    nothing = view([[0.9, 0.8]], entropy=[[0.5, 0.6]])
    assert chosen(EntropyBounded(0.0, keep_largest=True), nothing) == ([[1, 0]], [[1, 0]])
    holes = view([[0.9, 0.8, 0.7]], [[0, 1, 1]], entropy=[[9.0, 0.1, 0.1]])
    assert chosen(EntropyBounded(0.1), holes)[0] == [[0, 1, 1]]


def test_entropy_bounded_does_not_mix_slots():
    """The reference of this rule takes its running maximum over the batch; a slot must not see its neighbours."""
    alone = view([[0.9, 0.8, 0.7]], entropy=[[0.3, 0.2, 0.2]])
    both = view([[0.9, 0.8, 0.7]] * 2, entropy=[[0.9, 0.9, 0.9], [0.3, 0.2, 0.2]])
    assert chosen(EntropyBounded(0.2), alone)[0][0] == chosen(EntropyBounded(0.2), both)[0][1]


def test_local_leap():
    score = [0.95, 0.8, 0.5, 0.8, 0.8, 0.8]
    assert chosen(LocalLeap(radius=1), view([score]))[0] == [[1, 1, 0, 0, 0, 0]]
    assert chosen(LocalLeap(radius=3), view([score]))[0] == [[1, 1, 0, 1, 0, 0]]
    assert chosen(LocalLeap(), view([[0.8, 0.7]])) == ([[1, 0]], [[1, 0]])


def test_hierarchical_takes_the_best_of_each_run():
    step = view([[0.5, 0.6, 0.1, 0.3, 0.95, 0.92]], [[1, 1, 0, 1, 1, 1]])
    assert chosen(Hierarchical(), step)[0] == [[0, 1, 0, 0, 1, 1]]
    ties = view([[0.5, 0.5, 0.1, 0.5, 0.5]], [[1, 1, 0, 1, 1]])
    assert chosen(Hierarchical(), ties)[0] == [[1, 0, 0, 1, 0]]
    assert chosen(Hierarchical(low=0.7), ties) == ([[1, 0, 0, 0, 0]], [[1, 0, 0, 0, 0]])


def test_block_adaptive_follows_what_the_block_has_settled():
    score = [[0.85, 0.7, 0.65]]
    assert chosen(BlockAdaptive(), view(score))[0] == [[1, 0, 0]]  # the bar is the best score
    assert chosen(BlockAdaptive(), view(score, settled=0.68))[0] == [[1, 1, 0]]
    assert chosen(BlockAdaptive(), view(score, settled=0.1))[0] == [[1, 1, 1]]  # never below .6
    assert chosen(BlockAdaptive(), view(score, settled=0.99)) == ([[1, 0, 0]], [[1, 0, 0]])  # never above .9, and forced


@pytest.mark.parametrize(
    "length, commits", [(64, [1, 2, 4, 8, 16, 33]), (128, [1, 2, 4, 8, 16, 32, 65]), (200, [1, 2, 4, 8, 16, 32, 137])]
)
def test_doubling_is_the_published_schedule(length, commits):
    masked, counts = torch.ones(1, length, dtype=torch.bool), []
    while masked.any():
        commit, _ = Doubling()(view(torch.rand(1, length).tolist(), masked.tolist(), block_step=len(counts)))
        counts.append(int(commit.sum()))
        masked &= ~commit
    assert counts == commits


SPEC = DiffusionSpec(mask_token_id=9, eos_token_ids=(1,), attention="full", block_size=0)


@pytest.mark.parametrize("gamma, values", [(0.4, [0.348019, 0.571746, 0.870049]), (0.01, [0.008700, 0.377850, 0.870049])])
def test_eoser_is_the_published_factor(gamma, values):
    decoder = Decoder.resolve(DecoderConfig(eos_gamma=gamma), SPEC)
    logits = torch.tensor([[2.0, 0, 1, -1], [0, 3, 0, 0], [1, 1, 1, 2]])
    score = torch.zeros(1, 8)
    score[0, :3] = logits.softmax(-1)[range(3), [0, 1, 3]]
    is_eos = torch.tensor([[False, True, False] + [False] * 5])
    for step, value in zip((0, 3, 7), values, strict=True):
        weighed = decoder.weigh_eos(score, is_eos, torch.tensor([step]))[0, :3].tolist()
        assert weighed == pytest.approx([0.643914, value, 0.475367], abs=1e-5)
    assert not decoder.state_only


def test_eoser_with_doubling():
    decoder = Decoder.resolve(DecoderConfig(select="doubling", eos_gamma=0.01), SPEC)
    one, eos = torch.ones(1, 128), torch.ones(1, 128, dtype=torch.bool)
    factors = [decoder.weigh_eos(one, eos, torch.tensor([i]))[0, 0].item() for i in range(7)]
    assert factors == pytest.approx([0.0177, 0.0332, 0.0641, 0.1260, 0.2498, 0.4973, 0.9923], abs=1e-4)


@pytest.mark.parametrize(
    "config, message",
    [
        (DecoderConfig(select="treshold"), "did you mean threshold"),
        (DecoderConfig(select="entropy_bounded", options={"gama": 1.0}), "did you mean gamma"),
        (DecoderConfig(select="threshold", eos_gamma=0.4), "fixed number of steps"),
    ],
)
def test_decoders_that_make_no_sense_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        Decoder.resolve(config, SPEC)


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("select", SELECTORS)
def test_every_selector_samples_batch_independently_and_replays(kind, select):
    model, tokenizer = tiny(kind)
    tokens = prompts(tokenizer, 6)
    gamma = {"eos_gamma": 0.2} if select in ("static", "doubling") else {}
    together, _ = sample(model, tokens, max_tokens=13, select=select, threshold=0.4, **gamma)
    assert together[0].decoder["selector"] is not None
    for i in (0, 5):
        alone, _ = sample(model, [tokens[i]], [i], max_tokens=13, select=select, threshold=0.4, **gamma)
        np.testing.assert_array_equal(alone[0].response_ids, together[i].response_ids)
        np.testing.assert_array_equal(alone[0].step_map(), together[i].step_map())
    assert replay(model, together, 3).max() <= 1e-5
