"""pass@k against every subset, intervals against published ones, against enumeration and against repeated trials."""

import itertools
import math

import numpy as np
import pytest

from rlpipe.evaluation import intervals, measures
from rlpipe.evaluation.samples import Sample


def sample(reward=1.0, tokens=4, forwards=2, text="a", **parts):
    verdict = {"reward": reward} | parts
    return Sample(uid="p", sample=0, text=text, tokens=tokens, forwards=forwards, stop="eos", exact=True, parts=verdict)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    rows = np.array(list(itertools.product([False, True], repeat=n)))
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        wanted = [np.mean([row[list(subset)].any() for subset in subsets]) for row in rows]
        assert measures.pass_at_k(rows, k).tolist() == pytest.approx(wanted, abs=1e-15)
    assert measures.pass_at_k(rows, 1).tolist() == rows.mean(1).tolist()


def test_pass_at_k_is_unbiased():
    """Its mean over all outcomes of n draws is 1 - (1 - p)^k, whatever n."""
    n, k, p = 6, 3, 0.3
    rows = np.array(list(itertools.product([False, True], repeat=n)))
    weight = p ** rows.sum(1) * (1 - p) ** (n - rows.sum(1))
    assert (weight * measures.pass_at_k(rows, k)).sum() == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    right = np.zeros((1, 2000), bool)
    right[0, :3] = True
    assert measures.pass_at_k(right, 1000)[0] == pytest.approx(1 - (1000 * 999 * 998) / (2000 * 1999 * 1998), abs=1e-14)
    for k in (0, 2001):
        with pytest.raises(ValueError):
            measures.pass_at_k(right, k)


@pytest.mark.parametrize(
    "right, of, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_one_draw_a_prompt_is_wilson_as_published(right, of, low, high):
    """Newcombe 1998, table I, method 3."""
    found = intervals.share(np.repeat([1.0, 0.0], [right, of - right]), 0.95)
    assert found.value == right / of
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_covers_as_it_says():
    """Over every outcome of 60 draws, weighted by its probability."""
    covered = []
    for p in np.linspace(0.05, 0.95, 19):
        inside = 0.0
        for right in range(61):
            low, high = intervals.wilson(right / 60, 60, 0.95)
            inside += math.comb(60, right) * p**right * (1 - p) ** (60 - right) * (low <= p <= high)
        covered.append(inside)
    assert min(covered) > 0.92 and np.mean(covered) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("spread", [0.3, 2.0, 50.0])
def test_responses_to_one_prompt_are_not_counted_as_independent(spread):
    """Prompts whose chance is Beta-distributed, 8 responses each: the interval covers the mean; one that takes all responses
    for independent does not where prompts differ."""
    rng, prompts, samples = np.random.default_rng(5), 80, 8
    hit = naive = 0
    for _ in range(600):
        chance = rng.beta(0.6 * spread, 0.4 * spread, prompts)
        values = rng.binomial(samples, chance) / samples
        found = intervals.share(values, 0.95, draws=samples)
        low, high = intervals.wilson(found.value, prompts * samples, 0.95)
        hit += found.low <= 0.6 <= found.high
        naive += low <= 0.6 <= high
    assert 0.925 < hit / 600 < 0.975
    assert naive / 600 < (0.7 if spread < 1 else 0.9 if spread < 10 else 0.98)


def test_shares_at_the_ends_and_of_one_prompt():
    nothing = intervals.share(np.zeros(20), 0.95, draws=8)
    assert (nothing.value, nothing.low, round(nothing.high, 4)) == (0.0, 0.0, 0.1611)
    everything = intervals.share(np.ones(20), 0.95)
    assert everything.high == 1.0 and everything.low == pytest.approx(1 - nothing.high)
    assert intervals.share(np.array([0.5]), 0.95).low is None
    alike = intervals.share(np.full(10, 0.5), 0.95, draws=4)  # at most all draws count as independent
    assert (alike.low, alike.high) == intervals.wilson(0.5, 40, 0.95)


def test_tokens_per_forward_is_a_ratio_of_sums_with_its_error():
    tokens, forwards = np.array([10, 20, 30]), np.array([5, 5, 20])
    found = intervals.ratio(tokens, forwards, 0.95)
    assert found.value == 2.0
    residuals = tokens - 2.0 * forwards
    half = 1.959964 * math.sqrt(3 / 2 * (residuals**2).sum()) / 30
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)
    rng, hit = np.random.default_rng(1), 0
    for _ in range(400):
        f = rng.integers(4, 20, 100)
        t = f * rng.choice([1, 3], 100)  # the true ratio is 2
        one = intervals.ratio(t, f, 0.9)
        hit += one.low <= 2 <= one.high
    assert 0.86 < hit / 400 < 0.94


def test_average_has_standard_errors():
    values = np.array([1.0, -1.0, 3.0, 1.0])
    found = intervals.average(values, 0.95)
    half = 1.959964 * values.std(ddof=1) / 2
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1 - half, 1 + half), rel=1e-6)
    assert intervals.average(values[:1], 0.95) == intervals.Estimate(1.0, None, None)


def test_figures_of_groups():
    groups = [[sample(1.0, 4, 2), sample(0.0, 6, 3)], [sample(1.0, 1, 1), sample(1.0, 1, 1, right=0.0)]]
    assert measures.values(groups, "reward").tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert [counts.tolist() for counts in measures.speed(groups)] == [[10, 2], [5, 2]]
    with pytest.raises(KeyError):
        measures.values(groups, "right")
    shaped = [[sample(0.6, correct=1.0), sample(0.4)]]
    assert measures.correctness(shaped).tolist() == [[1.0, 0.4]]
