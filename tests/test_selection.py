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
from rlpipe.sampling.schedule import Doubling, Even, MaskGit, PerStep, TimeGrid
from rlpipe.sampling.scoring import SCORERS, StepView, shuffled
from rlpipe.sampling.selection import (
    SELECTORS,
    Bernoulli,
    BlockAdaptive,
    EntropyBounded,
    Factor,
    Hierarchical,
    LocalLeap,
    Prophet,
    Stable,
    Static,
    Threshold,
    WideIn,
)  # fmt: skip
from rlpipe.sampling.statistics import RowStatistics, row_statistics


def view(
    score, masked=None, entropy=None, time=0, settled=math.nan, quota=1, schedule=None, second=None, stable=0, noise=None
) -> StepView:
    score = torch.tensor(score, dtype=torch.float32)
    masked = torch.ones_like(score, dtype=torch.bool) if masked is None else torch.tensor(masked).bool()
    entropy = torch.zeros_like(score) if entropy is None else torch.tensor(entropy, dtype=torch.float32)
    second = score if second is None else torch.tensor(second, dtype=torch.float32)
    statistics = RowStatistics(*[score] * 5, second, entropy)
    every = lambda value: torch.full((len(score),), value)  # noqa: E731
    return StepView(
        score=score,
        masked=masked,
        statistics=statistics,
        noise=torch.zeros(score.shape, dtype=torch.float64) if noise is None else torch.tensor(noise, dtype=torch.float64),
        quota=every(quota),
        time=every(time),
        opened=masked.sum(1),
        length=every(score.shape[1]),
        schedule=schedule or PerStep(quota),
        settled=every(float(settled)),
        stable=torch.full(score.shape, stable),
    )


def chosen(selector, step: StepView) -> tuple[list, list]:
    commit, forced = selector(step)
    assert not (commit & ~step.masked).any() and not (forced & ~commit).any()
    assert (commit.any(-1) == step.masked.any(-1)).all(), "progress in every slot that has a mask"
    return commit.int().tolist(), forced.int().tolist()


def test_ties_go_to_the_lowest_position():
    step = view([[0.5, 0.9, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4]], [[1, 0, 1, 1], [1, 1, 1, 0]])
    assert chosen(Static(), step)[0] == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert chosen(Threshold(0.9), step) == ([[0, 0, 1, 1], [0, 0, 1, 0]], [[0] * 4, [0, 0, 1, 0]])
    step = view([[0.5, 0.9, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4]], [[1, 0, 1, 1], [1, 1, 1, 0]], quota=2)
    assert chosen(Threshold(0.3), step) == ([[1, 0, 1, 1], [0, 1, 1, 0]], [[0] * 4, [0, 1, 0, 0]])
    assert chosen(Threshold(0.3, enough=1), step)[0] == [[1, 0, 1, 1], [0, 0, 1, 0]], "one that passes is enough"
    assert chosen(Threshold(0.95, enough=1), step)[0] == [[0, 0, 1, 1], [0, 1, 1, 0]], "none passes: the schedule's share"
    assert chosen(Static(), step._replace(quota=torch.tensor([9, 9])))[0] == [[1, 0, 1, 1], [1, 1, 1, 0]]
    assert chosen(Static(), view([[0.5, 0.6]], [[0, 0]]))[0] == [[0, 0]]


def test_threshold_is_the_reference_with_its_fallback():
    """LLaDA's get_transfer_index at confidence .9 and .995 (vector V10): the best one is taken when none passes."""
    logits = torch.tensor([[2.0, 0, 0], [5, 0, 0], [0, 1, 0.9], [0, 0, 3]])
    score = [logits.softmax(-1).amax(-1).tolist()]
    masked = [[1, 1, 1, 0]]
    assert chosen(Static(), view(score, masked, quota=2))[0] == [[1, 1, 0, 0]]
    assert chosen(Threshold(0.9), view(score, masked)) == ([[0, 1, 0, 0]], [[0, 0, 0, 0]])
    assert chosen(Threshold(0.995), view(score, masked)) == ([[0, 1, 0, 0]], [[0, 1, 0, 0]])
    negative_entropy = -torch.distributions.Categorical(logits=logits).entropy()
    # The reference's neg_entropy has the wrong sign and takes the least certain position; ours is the meant one.
    assert chosen(Static(), view([negative_entropy.tolist()], masked, quota=2))[0] == [[1, 1, 0, 0]]


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
    assert shares(Doubling(), length) == commits


def shares(schedule, opened: int) -> list[int]:
    """Commits of the steps of a block with so many masks, until it is full."""
    masked, counts = opened, []
    while masked > 0:
        count = schedule.commits(torch.tensor([opened]), torch.tensor([masked]), torch.tensor([len(counts)])).item()
        counts.append(min(count, masked))
        masked -= counts[-1]
        left = schedule.left(torch.tensor([opened]), torch.tensor([len(counts) - 1])).item()
        assert isinstance(schedule, TimeGrid) or left == masked
    assert schedule.last(torch.tensor([opened]), torch.tensor([len(counts) - 1])) or isinstance(schedule, Even)
    return counts


@pytest.mark.parametrize(
    "schedule, opened, counts",
    [
        (Even(4), 10, [3, 3, 2, 2]),  # LLaDA and EOSER-ASS-RL
        (Even(4), 6, [2, 2, 1, 1]),  # TraceRL's LLaDA sampler; its second vector ends in three empty steps, which we leave out
        (Even(4), 1, [1]),
        (Even(5), 32, [7, 7, 6, 6, 6]),
        (MaskGit("linear", 4), 10, [3, 2, 3, 2]),  # MDPO: other rounding than LLaDA's
        (MaskGit("cosine", 4), 32, [3, 7, 10, 12]),
        (MaskGit("pow", 8), 32, [1, 1, 3, 3, 5, 5, 7, 7]),
        (MaskGit("log", 5), 32, [18, 6, 4, 2, 2]),
        (MaskGit("exp", 5), 32, [2, 2, 4, 9, 15]),
        (PerStep(3), 8, [3, 3, 2]),
    ],
)
def test_schedules_are_the_published_ones(schedule, opened, counts):
    assert shares(schedule, opened) == counts


def test_the_time_grid_is_dreams_and_passes_over_its_empty_steps():
    """Reference: n · (1 - s / t) rounded down on t = linspace(1, 1e-3, steps + 1), everything at the last step."""
    for masks, steps in ((20, 20), (7, 20), (64, 8), (512, 512)):
        grid, left, reference = np.linspace(1, 1e-3, steps + 1), masks, []
        for i in range(steps):
            count = left if i == steps - 1 else int(left * (1 - grid[i + 1] / grid[i]))
            left -= count
            reference.append((i, count))
        schedule, time, left, ours = TimeGrid(steps), torch.tensor([0]), masks, []
        while left:
            time = schedule.useful(torch.tensor([left]), time)
            ours.append((time.item(), schedule.commits(None, torch.tensor([left]), time).item()))
            left, time = left - ours[-1][1], time + 1
        assert ours == [(i, count) for i, count in reference if count]


def test_bernoulli_commits_with_the_grids_probability():
    schedule = TimeGrid(4)
    noise = [[(i + 0.5) / 1000 for i in range(1000)]]
    for time, share in ((0, 0.24975), (1, 0.3329), (3, 1.0)):
        commit, forced = Bernoulli()(view([[0.5] * 1000], time=time, schedule=schedule, noise=noise))
        assert commit.float().mean().item() == pytest.approx(share, abs=1e-3) and not forced.any()


def test_prophet_commits_all_once_the_answer_is_clear():
    score, schedule = [[0.3, 0.4, 0.6, 0.7]], PerStep(1)
    sure = [[0.3, 0.4, 0.6 * math.exp(-6), 0.7 * math.exp(-6)]]  # a gap of 6 at the last two positions
    ask = Prophet(answer_from=-2, answer_len=2)
    assert chosen(ask, view(score, second=sure, schedule=schedule))[0] == [[0, 0, 0, 1]]  # early: 7.5 is asked for
    assert chosen(ask, view(score, second=sure, time=2, schedule=schedule))[0] == [[1, 1, 1, 1]]  # middle third: 5
    assert chosen(Prophet(0, 2), view(score, second=sure, time=2, schedule=schedule))[0] == [[0, 0, 0, 1]]
    nothing_left = view(score, [[1, 1, 0, 0]], second=sure, time=3, schedule=schedule)
    assert chosen(ask, nothing_left)[0] == [[0, 1, 0, 0]], "a window without masks says nothing"


def test_stable_wants_confidence_that_lasts():
    score = [[0.95, 0.92, 0.5]]
    assert chosen(Stable(), view(score, stable=2))[0] == [[1, 1, 0]]
    assert chosen(Stable(), view(score, stable=1)) == ([[1, 0, 0]], [[1, 0, 0]])


def test_wide_in_is_bounded():
    assert chosen(WideIn(), view([[0.7] * 10 + [0.1] * 10]))[0] == [[1] * 10 + [0] * 10]
    assert sum(chosen(WideIn(), view([[0.7] * 60]))[0][0]) == 20
    assert sum(chosen(WideIn(), view([[0.7] * 8]))[0][0]) == 5
    assert chosen(WideIn(), view([[0.3, 0.5]])) == ([[0, 1]], [[0, 1]])


def test_order_temperature_draws_positions_by_score():
    """The top one of score + Gumbel · T follows softmax(score / T)."""
    noise = torch.rand(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = shuffled(torch.tensor([[0.1, 0.4, 0.7]]), noise, 0.3).argmax(1)
    share = torch.bincount(first, minlength=3) / len(first)
    assert share.tolist() == pytest.approx(torch.softmax(torch.tensor([0.1, 0.4, 0.7]) / 0.3, 0).tolist(), abs=0.01)


SPEC = DiffusionSpec(mask_token_id=9, eos_token_ids=(1,), attention="full", block_size=0)


@pytest.mark.parametrize("gamma, values", [(0.4, [0.348019, 0.571746, 0.870049]), (0.01, [0.008700, 0.377850, 0.870049])])
def test_eoser_is_the_published_factor(gamma, values):
    decoder = Decoder.resolve(DecoderConfig(eos_gamma=gamma, schedule="even", steps=8), SPEC)
    logits = torch.tensor([[2.0, 0, 1, -1], [0, 3, 0, 0], [1, 1, 1, 2]])
    score = torch.zeros(1, 8)
    score[0, :3] = logits.softmax(-1)[range(3), [0, 1, 3]]
    is_eos = torch.tensor([[False, True, False] + [False] * 5])
    for step, value in zip((0, 3, 7), values, strict=True):
        weighed = decoder.weigh_eos(score, is_eos, torch.tensor([8]), torch.tensor([step]))[0, :3].tolist()
        assert weighed == pytest.approx([0.643914, value, 0.475367], abs=1e-5)
    assert not decoder.state_only


def test_eoser_with_doubling():
    decoder = Decoder.resolve(DecoderConfig(schedule="doubling", eos_gamma=0.01), SPEC)
    one, eos = torch.ones(1, 128), torch.ones(1, 128, dtype=torch.bool)
    factors = [decoder.weigh_eos(one, eos, torch.tensor([128]), torch.tensor([i]))[0, 0].item() for i in range(7)]
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
    gamma = {"eos_gamma": 0.2} if select == "static" else {}
    gamma |= {"schedule": "dream", "steps": 9} if select == "bernoulli" else {}
    together, _ = sample(model, tokens, max_tokens=13, select=select, threshold=0.4, **gamma)
    assert together[0].decoder["selector"] is not None
    for i in (0, 5):
        alone, _ = sample(model, [tokens[i]], [i], max_tokens=13, select=select, threshold=0.4, **gamma)
        np.testing.assert_array_equal(alone[0].response_ids, together[i].response_ids)
        np.testing.assert_array_equal(alone[0].step_map(), together[i].step_map())
    assert replay(model, together, 3).max() <= 1e-5


def test_two_positions_enumerated():
    """Marginals .6/.4 and .7/.3, one commit a step. Chosen from the state: the second position, its tokens with exactly their
    probabilities. Chosen by the drawn token's probability, as published: (first, a) and (first, b) come with .18 and .12 where
    the token probabilities say .6 and .4, so their product is not the transition probability."""
    count = 40_000
    law = torch.log(torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3]])).repeat(count, 1)
    noise = torch.rand(2 * count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = row_statistics(law, noise, 1.0)
    laid_out = RowStatistics(*(values.view(count, 2) for values in drawn))
    masked = torch.ones(count, 2, dtype=torch.bool)
    frequency = {}
    for name in ("max_prob", "sampled_prob"):
        score = SCORERS[name].score(laid_out, torch.arange(2).expand(count, -1), torch.zeros(count, 2))
        view_of = view([[0.0, 0.0]])._replace(score=score, masked=masked, quota=torch.ones(count, dtype=torch.int64))
        commit, _ = Static()(view_of)
        events = [(p, int(laid_out.token[i, p])) for i, p in commit.nonzero().tolist()]
        frequency[name] = {event: events.count(event) / count for event in sorted(set(events))}
    assert frequency["max_prob"] == pytest.approx({(1, 1): 0.7, (1, 2): 0.3}, abs=0.01)
    published = {(0, 0): 0.18, (0, 1): 0.12, (1, 1): 0.7}
    assert frequency["sampled_prob"] == pytest.approx(published, abs=0.01)
