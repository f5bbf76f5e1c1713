"""The engine against a sampler without any cache, batch or packing; requests with settings of their own; weight updates."""

import copy
import math

import numpy as np
import pytest
import torch
from test_packing import replay
from tiny_models import prompts, sample, tiny, with_spec

from rlpipe.config import DecoderConfig
from rlpipe.errors import RolloutFailed
from rlpipe.models.packed_attention import dense_plan
from rlpipe.models.visibility import Tags
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.noise import TOKEN, uniform
from rlpipe.sampling.record import record
from rlpipe.sampling.request import Request
from rlpipe.sampling.statistics import inverse_cdf, row_statistics, support
from rlpipe.trajectory import COMMIT, EventLog, Trajectory


def naive(model, prompt, seed: int, max_tokens: int, per_step: int = 1, temperature: float = 1.0, threshold: float = 2.0):
    """Denoise one request: the whole canvas is forwarded from scratch every step. Returns (response, step map, logp)."""
    spec = model.spec
    end = len(prompt) + max_tokens
    if spec.block_size:
        end = -(-end // spec.block_size) * spec.block_size
    ids = torch.full((1, end), spec.mask_token_id)
    ids[0, : len(prompt)] = torch.as_tensor(prompt)
    where = torch.arange(end).unsqueeze(0)
    block = where // spec.block_size if spec.block_size else torch.zeros_like(where)
    zeros = torch.zeros_like(where[0])
    plan = dense_plan(Tags(zeros, zeros, block[0], zeros))
    steps, logp, step = torch.zeros(end, dtype=torch.int64), torch.zeros(end), 0
    start = len(prompt) // spec.block_size * spec.block_size if spec.block_size else len(prompt)
    while start < end:
        until = min(start + spec.block_size, end) if spec.block_size else end
        while (masked := (ids[0, start:until] == spec.mask_token_id).nonzero().squeeze(1) + start).numel():
            hidden = model.hidden(ids, where, plan)[0]
            noise = uniform(torch.tensor(seed), masked, torch.tensor(step), TOKEN)
            drawn = row_statistics(model.logits(hidden[masked]), noise, temperature)
            order = drawn.p_max.argsort(descending=True, stable=True)
            count = max(per_step, int((drawn.p_max >= threshold).sum()))
            best = order[:count]
            step += 1
            ids[0, masked[best]], steps[masked[best]], logp[masked[best]] = drawn.token[best], step, drawn.logp[best]
            eos = [i for i in range(len(prompt), len(prompt) + max_tokens) if ids[0, i] in spec.eos_token_ids]
            if not spec.block_size and eos and (ids[0, : eos[0]] != spec.mask_token_id).all():
                return ids[0, len(prompt) :], steps[len(prompt) :], logp[len(prompt) :]
        eos = [i for i in range(len(prompt), len(prompt) + max_tokens) if ids[0, i] in spec.eos_token_ids]
        if eos and eos[0] < until:
            return ids[0, len(prompt) : until], steps[len(prompt) : until], logp[len(prompt) : until]
        start = until
    return ids[0, len(prompt) :], steps[len(prompt) :], logp[len(prompt) :]


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("how", [{}, {"tokens_per_step": 3}, {"select": "threshold", "threshold": 0.3, "temperature": 0.0}])
@pytest.mark.parametrize("slots, prefill_rows", [(0, 4096), (3, 4), (1, 4096)])
def test_the_engine_is_the_naive_sampler(kind, how, slots, prefill_rows):
    """Fused commits, packing, refilled slots, chunked and shared prompts change nothing: tokens exactly, log-probs to 1e-6."""
    model, tokenizer = tiny(kind)
    tokens = [ids for ids in prompts(tokenizer, 4) for _ in range(3)]  # groups of three, prompts of 3 to 13 tokens
    tokens.append(np.array([5], np.int32))  # P < B
    budgets = [11, 5, 12, 3, 8, 7, 1, 2, 9, 10, 4, 6, 13]
    options = {"options": {"prefill_rows": prefill_rows}} if kind == "block" else {}
    got, counters = sample(model, tokens, budgets=budgets, slots=slots, **how, **options)
    with torch.inference_mode():
        for i, ids in enumerate(tokens):
            threshold = how.get("threshold", 2.0)
            want = naive(model, ids, i, budgets[i], how.get("tokens_per_step", 1), how.get("temperature", 1.0), threshold)
            np.testing.assert_array_equal(got[i].response_ids, want[0].numpy())
            np.testing.assert_array_equal(got[i].step_map(), want[1].numpy())
            np.testing.assert_allclose(got[i].at_commit("logp"), want[2].numpy(), atol=2e-6)
    assert 0 < counters.occupancy <= 1


def test_a_prompt_is_prefilled_once_a_group():
    model, tokenizer = tiny("block")
    ids = np.array(tokenizer("123+4=567-8*9=01")["input_ids"], np.int32)  # four whole blocks
    for slots in (6, 2):
        _, counters = sample(model, [ids] * 6, max_tokens=8, slots=slots, stop="length")
        assert counters.prefill_rows == 0 or counters.prefill_rows == 16
        fresh = 16 if counters.prefill_rows == 0 else counters.prefill_rows
        assert counters.rows == fresh + 6 * (2 * 4 * 4 + 4), "two blocks of four steps, one of them committed beside the next"


def test_rows_and_forwards_of_block_decoding():
    """D forwards a block, (D + 1) · B rows but for the last block, which nobody reads; the head sees masked rows only."""
    model, tokenizer = tiny("block")
    ids = np.array(tokenizer("1234")["input_ids"], np.int32)
    for per_step, steps in ((1, 4), (2, 2), (4, 1)):
        _, counters = sample(model, [ids], max_tokens=40, tokens_per_step=per_step, stop="length")
        assert counters.forwards == 10 * steps
        assert counters.rows == 4 + 10 * steps * 4 + 9 * 4
        assert counters.head_rows == 10 * sum(4 - per_step * s for s in range(steps))


def test_long_prompts_do_not_hold_up_the_others():
    """A prompt of many blocks is prefilled in pieces while the other slots denoise."""
    model, tokenizer = tiny("block")
    long = np.array(tokenizer("123+4=567-8*9=01" * 4)["input_ids"], np.int32)
    short = np.array(tokenizer("12=")["input_ids"], np.int32)
    both, counters = sample(model, [long, short], max_tokens=8, stop="length", options={"prefill_rows": 16})
    alone, _ = sample(model, [long], max_tokens=8, stop="length")
    np.testing.assert_array_equal(both[0].response_ids, alone[0].response_ids)
    # four pieces of 16 rows, the last of which already carries the first block; the short one goes on meanwhile
    assert counters.forwards == 3 + 8 and counters.prefill_rows == 48


@pytest.mark.parametrize("kind", ("block", "full"))
def test_a_request_may_have_settings_of_its_own(kind):
    model, tokenizer = tiny(kind)
    tokens = prompts(tokenizer, 6)
    requests = [
        Request(prompt_ids=ids, uid=str(i), sample=0, seed=i, temperature=t, top_k=k, top_p=p)
        for i, (ids, t, k, p) in enumerate(
            zip(tokens, (0.0, 1.0, 0.5, None, 1.0, 1.0), (0, 1, 3, None, 0, 0), (None, 1.0, 1.0, None, 0.6, 1e-6), strict=True)
        )
    ]
    decoder = Decoder.resolve(DecoderConfig(max_tokens=9, stop="length"), model.spec)
    mixed, _ = Engine(model).sample(requests, decoder=decoder, version=0)
    for i, request in enumerate(requests):
        own = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
        own = {k: v for k, v in own.items() if v is not None}
        alone, _ = sample(model, [tokens[i]], [i], max_tokens=9, stop="length", **own)
        np.testing.assert_array_equal(mixed[i].response_ids, alone[0].response_ids)
        np.testing.assert_allclose(mixed[i].events.logp, alone[0].events.logp, atol=2e-6)
    greedy, _ = sample(model, [tokens[1]], [1], max_tokens=9, stop="length", temperature=0.0)
    np.testing.assert_array_equal(mixed[1].response_ids, greedy[0].response_ids)
    assert [t.exact for t in mixed] == [False, False, False, True, False, False], "only the decoder's own law can be replayed"


@pytest.mark.parametrize("kind", ("block", "full"))
def test_bias_and_stop_ids(kind):
    model, tokenizer = tiny(kind)
    tokens = prompts(tokenizer, 8)
    digits = tokenizer("0123456789")["input_ids"]
    everything = {i: -math.inf for i in range(len(tokenizer)) if i not in digits}
    requests = [
        Request(
            prompt_ids=ids,
            uid=str(i),
            sample=0,
            seed=i,
            bias=everything if i % 2 else {},
            stop_ids=(digits[3],) if i > 3 else (),
        )
        for i, ids in enumerate(tokens)
    ]
    decoder = Decoder.resolve(DecoderConfig(max_tokens=10), model.spec)
    found, _ = Engine(model).sample(requests, decoder=decoder, version=0)
    plain, _ = sample(model, tokens, max_tokens=10)
    for i, t in enumerate(found):
        valid = t.response_ids[: t.valid_len]
        assert not i % 2 or np.isin(valid, digits).all()
        if i > 3 and digits[3] in valid:
            assert t.stop == "eos" and valid.tolist().index(digits[3]) == t.valid_len - 1
        if i in (0, 2):
            np.testing.assert_array_equal(t.response_ids, plain[i].response_ids)
        mask = model.spec.mask_token_id
        assert mask not in valid
    biased = found[1]
    assert (biased.events.logp > biased.events.logp_t1).all() and not biased.exact


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_ids": np.array([], np.int32)}, "empty or contains MASK"),
        ({"temperature": -1.0}, "at least 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"preset": {40: 1}}, "offset 40"),
        ({"max_tokens": -3}, "at least 1"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(changes, message):
    model, tokenizer = tiny("block")
    request = Request(**({"prompt_ids": prompts(tokenizer, 1)[0], "uid": "p", "sample": 0, "seed": 0} | changes))
    with pytest.raises(RolloutFailed, match=message):
        Engine(model).sample([request], decoder=Decoder.resolve(DecoderConfig(), model.spec), version=0)


def test_top_p_and_top_k_are_the_references():
    """TraceRL's sampler: ties of the k-th stay; the smallest set that reaches top_p."""
    row = torch.tensor([[2.0, 1, 0, -1]]).log_softmax(-1)
    assert support(row, 0.8, 0).tolist() == [[True, True, False, False]]
    assert support(torch.tensor([[2.0, 1, 1, -1]]).log_softmax(-1), 1.0, 2).tolist() == [[True, True, True, False]]
    assert support(row, 1.0, 0) is None
    per_row = support(row.expand(3, -1), torch.tensor([0.8, 1.0, 0.1]), torch.tensor([0, 1, 0]))
    assert per_row.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    drawn = row_statistics(torch.tensor([[2.0, 1, 0, -1]]), torch.tensor([0.99], dtype=torch.float64), 1.0, top_p=0.8)
    two = torch.tensor([2.0, 1]).log_softmax(0)
    assert drawn.token.item() == 1 and drawn.logp.item() == pytest.approx(two[1].item(), abs=1e-6)
    assert drawn.logp_t1.item() == pytest.approx(row[0, 1].item(), abs=1e-6)


def test_a_large_vocabulary_is_drawn_by_chunks():
    probs = torch.rand(40, 5003, generator=torch.Generator().manual_seed(0)) ** 8
    probs[:, 4000:] = 0
    probs /= probs.sum(1, keepdim=True)
    noise = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise[:2] = torch.tensor([0.0, 1 - 2**-53])
    cdf = probs.double().cumsum(1)
    want = torch.searchsorted(cdf, (noise * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    got = inverse_cdf(probs, noise)
    assert (got[2:] == want[2:]).all() and (probs.gather(1, got.unsqueeze(1)) > 0).all()


@pytest.mark.parametrize("recompute", (True, False))
def test_new_weights_wait_for_the_end_of_the_block(recompute):
    """Every block has one version; with recomputed keys each replays under its own weights, given the tokens before it."""
    old, tokenizer = tiny("block")
    new, _ = tiny("block", seed=1)
    model = copy.deepcopy(old)
    tokens = prompts(tokenizer, 5)
    requests = [Request(prompt_ids=ids, uid=str(i), sample=0, seed=i, max_tokens=10 + i) for i, ids in enumerate(tokens)]
    decoder = Decoder.resolve(DecoderConfig(stop="length"), model.spec)
    session = Engine(model).session(requests, decoder=decoder, version=3, slots=4)

    def load() -> int:
        model.load_state_dict(new.state_dict())
        return 4

    found = [None] * 5
    for step in range(200):
        if step == 6:
            session.update(load, recompute)
        done = session.step()
        for index, trajectory in zip(*done, strict=True) if done else ():
            found[index] = trajectory
        if not len(session.canvas):
            break
    assert {3, 4} == {int(v) for t in found for v in t.versions}
    for t in found:
        assert (np.diff(t.versions) >= 0).all() and len(set(t.versions)) <= 2
    by_version = {v: [t for t in found if set(t.versions) == {v}] for v in (3, 4)}
    assert by_version[4], "the fifth request began under the new weights"
    assert replay(new, by_version[4], 3).max() <= 1e-5
    for t in found:
        gap = block_gap(old, t, 3)
        assert gap.size == 0 or gap.max() <= 1e-5
        if len(set(t.versions)) == 2 and (fresh := block_gap(new, t, 4)).size:
            assert t.exact == recompute
            assert (fresh.max() <= 1e-5) == recompute, "old keys under new weights are seen"


def block_gap(model, trajectory, version: int) -> np.ndarray:
    """|logp - recorded| of the tokens of the blocks that were sampled with `version`."""
    from rlpipe.models.packing import make_piece, pack
    from rlpipe.objectives.planner import plan_replay, response_blocks

    rows = plan_replay(trajectory)
    piece = make_piece(trajectory.prompt_ids, trajectory.response_ids, rows.masked, rows.scored, block_size=4,
                       mask_id=model.spec.mask_token_id)  # fmt: skip
    batch = pack([piece], [piece.slot])
    with torch.no_grad():
        logp, _ = model(batch.input_ids, batch.position_ids, batch.plan(), batch.index, batch.targets)
    place = np.broadcast_to(np.arange(trajectory.response_len), rows.scored.shape)[rows.scored]
    block = response_blocks(trajectory) - trajectory.prompt_len // 4
    wanted = np.broadcast_to(trajectory.at_commit("logp"), rows.scored.shape)[rows.scored][batch.slot.numpy()]
    mine = trajectory.versions[block[place]][batch.slot.numpy()] == version
    return np.abs(logp.numpy() - wanted)[mine]


def test_full_attention_takes_new_weights_at_once():
    model, tokenizer = copy.deepcopy(tiny("full")[0]), tiny("full")[1]
    requests = [Request(prompt_ids=ids, uid=str(i), sample=0, seed=i) for i, ids in enumerate(prompts(tokenizer, 3))]
    decoder = Decoder.resolve(DecoderConfig(max_tokens=8, stop="length"), model.spec)
    session = Engine(model).session(requests, decoder=decoder, version=0)
    for _ in range(3):
        session.step()
    session.update(lambda: 1)
    found = [t for _, part in session for t in part]
    assert len(found) == 3 and all(t.version == 0 for t in found) and session.canvas.version == 1


@pytest.mark.parametrize(
    "prompt, response, steps, kept, eos",
    [
        ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15, 7, 16], [1, 3, 2, 5, 4, 6, 7], [1, 3, 2, 5, 4, 6], 7),
        ([1, 2, 3, 4], [11, 12, 13, 14, 15, 16, 17, 18], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6], 7),
    ],
)
def test_the_terminal_block_is_kept_whole_and_counted_as_jetengine_counts(prompt, response, steps, kept, eos):
    """Vector V10 of the notes: blocks of 4, max_tokens 6; the tokens that count have the reference's steps, and what it drops
    stays in the record because it conditioned them."""
    from rlpipe.models.spec import DiffusionSpec

    spec = DiffusionSpec(mask_token_id=99, eos_token_ids=(eos,), block_size=4)
    width, start = len(prompt) + len(response), len(prompt)
    column = lambda values, dtype: np.array([0] * start + list(values), dtype)  # noqa: E731
    zeros = np.zeros(width, np.float32)
    slot = {
        "ids": np.array(prompt + response), "prompt_len": start, "limit": start + 6, "end": width, "block_end": width,
        "stop_ids": np.array([eos]), "stale": False, "step": column(steps, np.int32), "preset": np.zeros(width, bool),
        "version": np.zeros(width, np.int32), "forced": np.zeros(width, bool),
        "logp": zeros, "logp_t1": zeros, "confidence": zeros,
    }  # fmt: skip
    request = Request(prompt_ids=np.array(prompt, np.int32), uid="p", sample=0, seed=0)
    found = record([slot], [request], {"replayable": True}, spec)[0]
    assert found.step_map()[: found.valid_len].tolist() == kept and found.response_len == len(response)
    assert found.stop == ("eos" if eos in response else "length")


def test_a_step_map_is_the_first_snapshot_that_shows_the_token():
    """Vector V10: TraceRL's denoise_step_map, which counts from 0 where we count from 1."""
    snapshots, mask = [[7, 99, 5, 99, 99], [7, 99, 5, 6, 99], [7, 4, 5, 6, 8]], 99
    first = [min(i for i, canvas in enumerate(snapshots) if canvas[place] != mask) for place in range(5)]
    order = np.argsort(first, kind="stable").astype(np.int32)
    zeros = np.zeros(5, np.float32)
    events = EventLog(
        step=np.array(first, np.int32)[order], position=order, token=np.array(snapshots[-1], np.int32)[order],
        kind=np.full(5, COMMIT, np.int8), logp=zeros, logp_t1=zeros, confidence=zeros, forced=np.zeros(5, bool),
    )  # fmt: skip
    trajectory = Trajectory(
        uid="p", sample=0, seed=0, prompt_ids=np.array([1], np.int32), response_ids=np.array(snapshots[-1], np.int32),
        valid_len=5, block_size=0, versions=np.zeros(1, np.int32), stop="length", events=events, decoder={},
    )  # fmt: skip
    assert (trajectory.step_map() - 1).tolist() == [0, 2, 0, 1, 2]
    assert [trajectory.state(i + 1, mask).tolist() for i in range(3)] == snapshots


@pytest.mark.parametrize("cache", ("none", "dual", "every"))
def test_shifted_logits_need_no_first_token_by_force(cache):
    """The row before a block is forwarded with it, so a block's first token passes the same test as the others; the reference
    commits it untested, from the refresh. A cache that refreshes every step is exact here too."""
    model = with_spec(tiny("full")[0], logit_shift=1)
    tokens = prompts(tiny("full")[1], 6)
    settings = {
        "max_tokens": 12,
        "block_size": 4,
        "select": "threshold",
        "threshold": 0.2,
        "stop": "length",
        "score": "sampled_prob",
    }
    plain, _ = sample(model, tokens, **settings)
    options = {"options": {"every": 1}} if cache == "every" else {}
    found, counters = sample(model, tokens, cache=cache, **settings, **options)
    for one, other in zip(plain, found, strict=True):
        for t in (one, other):
            log = t.events
            assert ((log.confidence >= 0.2 - 1e-6) | log.forced).all()
            assert (np.bincount(log.step, weights=log.forced) <= 1).all(), "at most the best one is forced"
        if cache != "dual":
            np.testing.assert_array_equal(one.response_ids, other.response_ids)
    if cache == "dual":
        assert counters.rows < sum(12 * (12 + len(ids)) for ids in tokens)
    else:
        assert replay(model, found, 3).max() <= 1e-5
