"""Noise, statistics, selectors and the engine."""

import numpy as np
import pytest
import torch
from tiny_models import prompts, sample, tiny, with_spec

from rlpipe.config import DecoderConfig
from rlpipe.errors import ConfigError, RolloutFailed
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.noise import sample_seed, uniform
from rlpipe.sampling.scoring import SCORERS
from rlpipe.sampling.statistics import inverse_cdf, row_statistics

KINDS = ("block", "full")


def test_noise_is_a_function_of_its_counters_and_uniform():
    seed = torch.arange(50).unsqueeze(1) * 7919
    position = torch.arange(400)
    first, second = uniform(seed, position, torch.tensor(0)), uniform(seed, position, torch.tensor(1))
    assert torch.equal(first, uniform(seed, position, torch.tensor(0)))
    assert first.min() >= 0 and first.max() < 1
    assert abs(first.mean() - 0.5) < 0.01 and abs(first.var() - 1 / 12) < 0.005
    for other in (second, uniform(seed + 1, position, torch.tensor(0)), uniform(seed, position, torch.tensor(0), 1)):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.02
    assert sample_seed(0, "a", 1) == sample_seed(0, "a", 1) != sample_seed(0, "a", 11)
    assert 0 <= sample_seed(3, "b", 0) < 2**63


def test_inverse_cdf_draws_the_distribution_and_never_a_zero():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    noise = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = torch.bincount(inverse_cdf(probs.expand(10_000, -1), noise), minlength=6)
    assert drawn.tolist() == [0, 5000, 0, 3000, 2000, 0]
    edge = inverse_cdf(probs.expand(2, -1), torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64))
    assert edge.tolist() == [1, 4]


def test_row_statistics_by_hand():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1, 0.0]]))
    noise = torch.tensor([0.8], dtype=torch.float64)
    s = row_statistics(logits, noise, 1.0)
    assert s.token.item() == 1
    assert s.logp.item() == pytest.approx(np.log(0.2), abs=1e-6) == s.logp_t1.item()
    assert (s.p_max.item(), s.p_second.item()) == pytest.approx((0.7, 0.2))
    assert s.entropy.item() == pytest.approx(-(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1)), abs=1e-6)
    cold = row_statistics(logits, noise, 0.5)  # 0.49, 0.04, 0.01 of 0.54
    assert cold.token.item() == 0 and cold.logp.item() == pytest.approx(np.log(0.49 / 0.54), abs=1e-6)
    assert cold.logp_t1.item() == pytest.approx(np.log(0.7), abs=1e-6)
    assert row_statistics(logits, noise, 0.0).token.item() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", [{}, {"select": "threshold", "threshold": 0.5}, {"tokens_per_step": 3}])
def test_a_sample_does_not_depend_on_its_batch(kind, decoder):
    model, tokenizer = tiny(kind)
    tokens = prompts(tokenizer, 9)
    together, _ = sample(model, tokens, max_tokens=11, **decoder)
    backwards, _ = sample(model, tokens[::-1], list(range(9))[::-1], max_tokens=11, **decoder)
    for i in range(9):
        alone, _ = sample(model, [tokens[i]], [i], max_tokens=11, **decoder)
        for other in (alone[0], backwards[8 - i]):
            np.testing.assert_array_equal(together[i].response_ids, other.response_ids)
            np.testing.assert_array_equal(together[i].events.position, other.events.position)
            np.testing.assert_allclose(together[i].events.logp, other.events.logp, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", (1, 2, 5, 9, 50))
def test_slots_are_refilled_and_change_nothing(kind, slots):
    model, tokenizer = tiny(kind)
    tokens, budgets = prompts(tokenizer, 9), [1 + 5 * i % 13 for i in range(9)]
    want, _ = sample(model, tokens, budgets=budgets)
    got, counters = sample(model, tokens, budgets=budgets, slots=slots)
    for one, other, budget in zip(want, got, budgets, strict=True):
        assert one.uid == other.uid and one.valid_len == other.valid_len <= budget
        np.testing.assert_array_equal(one.response_ids, other.response_ids)
        np.testing.assert_array_equal(one.step_map(), other.step_map())
        np.testing.assert_allclose(one.events.logp, other.events.logp, atol=2e-6)
    assert counters.responses == 9


def test_a_short_request_does_not_wait_for_a_long_one():
    model, tokenizer = tiny("block")
    model = with_spec(model, eos_token_ids=())
    tokens = prompts(tokenizer, 4, ragged=False)
    budgets = [4, 16, 4, 4]
    _, counters = sample(model, tokens, budgets=budgets, slots=2)
    assert counters.forwards == 16, "three short ones pass through one slot while the long one holds the other"


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_is_whole(kind):
    model, tokenizer = tiny(kind)
    records, counters = sample(model, prompts(tokenizer, 12), max_tokens=10)
    for record in records:
        if kind == "block":
            assert (record.prompt_len + record.response_len) % 4 == 0  # the terminal block is kept whole
            assert (record.step_map() > 0).all()
            assert len(record.versions) == (record.prompt_len + record.response_len) // 4 - record.prompt_len // 4
        else:
            assert record.response_len == 10
        assert record.valid_len <= 10
        eos = np.flatnonzero(record.response_ids[:10] == tokenizer.eos_token_id)
        assert (record.stop == "eos") == bool(len(eos))
        assert record.valid_len == (eos[0] + 1 if len(eos) else 10)
        assert not np.isin(record.events.token, model.spec.forbidden_ids).any()
        assert (record.events.step[1:] >= record.events.step[:-1]).all()
    assert counters.tokens == sum(r.valid_len for r in records) and counters.responses == 12


def test_block_engine_forwards_rows_once_and_head_rows_only_where_masked():
    model, tokenizer = tiny("block")
    tokens = prompts(tokenizer, 5, ragged=False)  # 8 tokens: two whole blocks of prompt
    records, counters = sample(with_spec(model, eos_token_ids=()), tokens, max_tokens=8, score="left_to_right")
    assert all(r.stop == "length" for r in records)
    # Two blocks of four steps; the commit of a block rides in the first step of the next one.
    assert counters.forwards == 8
    assert counters.rows == 5 * (8 + 4 + 3 * 4 + 4 + 4 + 3 * 4)
    assert counters.head_rows == 5 * 2 * (4 + 3 + 2 + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_eos_ends_a_response(kind):
    model, tokenizer = tiny(kind)
    eos = (4, 5, 6)  # three common characters, so that some responses end early
    records, _ = sample(with_spec(model, eos_token_ids=eos), prompts(tokenizer, 8), max_tokens=40, score="left_to_right")
    ended = [r for r in records if r.stop == "eos"]
    assert ended
    for record in ended:
        assert record.response_ids[record.valid_len - 1] in eos
        assert not np.isin(record.response_ids[: record.valid_len - 1], eos).any()
        if kind == "block":  # nothing is sampled behind the block that holds the EOS
            last = (record.prompt_len + record.valid_len - 1) // 4
            assert record.prompt_len + record.response_len == (last + 1) * 4
        else:
            assert (record.step_map()[record.valid_len :] == 0).all()


def test_semi_autoregressive_blocks_of_a_full_attention_model():
    model, tokenizer = tiny("full")
    records, _ = sample(model, prompts(tokenizer, 4), max_tokens=12, block_size=4)
    for record in records:
        step = record.step_map()
        for block in range(2):
            here, after = step[block * 4 : block * 4 + 4], step[block * 4 + 4 :]
            assert here.max() < after[after > 0].min(initial=10**6)


@pytest.mark.parametrize("score", SCORERS)
def test_every_scorer_finishes(score):
    model, tokenizer = tiny("block")
    records, _ = sample(model, prompts(tokenizer, 3), max_tokens=7, score=score)
    assert records[0].decoder["state_only"] == (score != "sampled_prob")
    if score == "left_to_right":
        assert all((np.diff(r.step_map()) > 0).all() for r in records)


def test_contradictions_are_refused():
    model, tokenizer = tiny("block")
    with pytest.raises(ConfigError, match="blocks of 4"):
        Decoder.resolve(DecoderConfig(block_size=8), model.spec)
    with pytest.raises(ConfigError, match="decoder.score=best: known are"):
        Decoder.resolve(DecoderConfig(score="best"), model.spec)
    with pytest.raises(RolloutFailed, match="MASK"):
        sample(model, [np.array([model.spec.mask_token_id], np.int32)])


def test_state_only_choice_makes_the_product_of_probabilities_exact():
    """Two positions, enumerated: with max-prob the frequency of each outcome is the product of its commit probabilities."""
    model, tokenizer = tiny("full")
    prompt, count = prompts(tokenizer, 1)[0], 4000
    records, _ = sample(model, [prompt] * count, list(range(count)), max_tokens=2)
    expected, seen = {}, {}
    for record in records:
        key = tuple(record.response_ids.tolist())
        seen[key] = seen.get(key, 0) + 1
        expected[key] = float(np.exp(record.events.logp.sum())) if record.stop == "length" else None
    checked = [k for k, p in expected.items() if p is not None and p > 0.01]
    assert checked
    for key in checked:
        p = expected[key]
        assert abs(seen[key] / count - p) < 5 * np.sqrt(p * (1 - p) / count)
