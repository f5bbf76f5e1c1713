"""The visibility rule, the packed layout, the attention that computes only what the rule shows, and replay equal to rollout."""

import numpy as np
import pytest
import torch
from tiny_models import prompts, sample, tiny, with_spec

from rlpipe.models.attention import DensePlan
from rlpipe.models.packed_attention import FlexPlan, PartsPlan, dense_plan
from rlpipe.models.packing import make_piece, pack
from rlpipe.models.visibility import Tags, visibility
from rlpipe.objectives.planner import plan_replay


def reference_tags(prompt_len: int, response_len: int, size: int) -> Tags:
    """Tags that put our rule on the reference's grid: counted from the response, backwards in the prompt."""
    prompt = [-1 - (prompt_len - 1 - q) // size for q in range(prompt_len)]
    response = [j // size for j in range(response_len)]
    block = torch.tensor(prompt + response + response)
    copy = torch.tensor([0] * (prompt_len + response_len) + [1 + b for b in response])
    return Tags(torch.zeros_like(block), torch.ones_like(block), block, copy)


# make_basic_block_attention of the TraceRL reference, rows top to bottom, zeros to the right left out (vector V2).
V2 = {
    (2, 6, 2): ["11"] * 2 + ["1111"] * 2 + ["111111"] * 2 + ["11111111"] * 2
    + ["11000000110000"] * 2 + ["11110000001100"] * 2 + ["11111100000011"] * 2,
    (3, 5, 2): ["1"] + ["111"] * 2 + ["11111"] * 2 + ["1111111"] * 2 + ["11111111"]
    + ["1110000011000"] * 2 + ["1111100000110"] * 2 + ["1111111000001"],
    (2, 6, 3): ["11"] * 2 + ["11111"] * 3 + ["11111111"] * 3 + ["11000000111000"] * 3 + ["11111000000111"] * 3,
}  # fmt: skip


@pytest.mark.parametrize("shape", V2)
def test_visibility_equals_the_reference_mask(shape):
    tags = reference_tags(*shape)
    rows = [[int(v) for v in row.ljust(len(tags.block), "0")] for row in V2[shape]]
    assert visibility(tags).int().tolist() == rows


def test_sequences_and_responses_do_not_mix_and_share_their_prompt():
    zeros = torch.zeros(4, dtype=torch.long)
    apart = Tags(torch.tensor([0, 0, 1, 1]), zeros, zeros, zeros)
    assert visibility(apart).int().tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    # a prompt block, a response's clean block and its segment, another response's segment with the same ids
    shared = Tags(zeros, torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 1]))
    assert visibility(shared).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_a_partial_first_block_is_shown_with_its_prompt_tokens():
    prompt, response = np.array([1, 2, 3, 4, 5]), np.array([6, 7, 8])
    masked = np.array([[True, True, True], [False, True, False]])
    scored = np.array([[True, False, True], [False, True, False]])
    piece = make_piece(prompt, response, masked, scored, block_size=4, mask_id=99)
    batch = pack([piece], [piece.slot])
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4] + [5, 99, 99, 99] + [5, 6, 99, 8]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3] + [4, 5, 6, 7] * 2
    assert batch.tags.block.tolist() == [0] * 4 + [1] * 8
    assert batch.tags.copy.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert batch.index.tolist() == [5, 7, 10] and batch.targets.tolist() == [6, 8, 7] and batch.slot.tolist() == [0, 1, 2]


def test_only_segments_with_something_to_score_are_packed():
    prompt, response = np.arange(4), np.arange(10, 18)
    scored = np.zeros((2, 8), bool)
    scored[0, 1], scored[1, 6] = True, True
    piece = make_piece(prompt, response, scored, scored, block_size=4, mask_id=99)
    assert len(piece.prefix_ids) == 4 and len(piece) == 4 + 4 + 4  # clean block 1, one segment each in blocks 1 and 2
    assert make_piece(prompt, response, scored & False, scored & False, block_size=4, mask_id=99) is None


def test_off_grid_canvases_are_refused():
    scored = np.ones((1, 3), bool)
    with pytest.raises(ValueError, match="grid"):
        make_piece(np.arange(4), np.arange(3), scored, scored, block_size=4, mask_id=99)


def random_pack(rng, block_size: int, shared: bool = True):
    """Some groups of responses with random rows; prompts of every remainder, shorter than a block too."""
    pieces, slots, groups, count = [], [], [], 0
    for group in range(4):
        prompt = rng.integers(0, 50, rng.integers(0, 11))
        for _ in range(rng.integers(1, 4)):
            length = int(rng.integers(1, 4)) * 4 + (-len(prompt)) % 4
            masked = rng.random((rng.integers(1, 4), length)) < 0.7
            scored = masked & (rng.random(masked.shape) < 0.6)
            piece = make_piece(prompt, rng.integers(0, 50, length), masked, scored, block_size=block_size, mask_id=99)
            if piece is None:
                continue
            pieces.append(piece)
            slots.append(piece.slot + count)
            groups.append(group if shared else len(groups))
            count += len(piece.slot)
    return pack(pieces, slots, groups)


@pytest.mark.parametrize("block_size", (4, 0))
@pytest.mark.parametrize("seed", range(6))
def test_every_visible_pair_lies_in_exactly_one_look(block_size, seed):
    batch = random_pack(np.random.default_rng(seed), block_size)
    looked = torch.zeros(len(batch.tags.copy), len(batch.tags.copy), dtype=torch.int)
    for part in PartsPlan(batch.tags, batch.looks).parts:
        queries, keys = part.queries.index.view(part.shape[0]), part.keys.index.view(part.shape[1])
        seen = torch.ones(len(queries), queries.shape[1], keys.shape[1], dtype=torch.bool)
        if part.mask is not None:
            seen = part.mask[:, 0] == 0
        for member in range(len(queries)):
            own = slice(None) if part.queries.padding is None else ~part.queries.padding[member]
            pairs = queries[member][own][:, None], keys[member][None]
            looked.index_put_(pairs, seen[member][own].int(), accumulate=True)
    assert torch.equal(looked, visibility(batch.tags).int())


@pytest.mark.parametrize("block_size", (4, 0))
@pytest.mark.parametrize("kv_heads", (4, 2))
def test_parts_equal_the_dense_mask_forward_and_backward(block_size, kv_heads):
    for seed in range(4):
        batch = random_pack(np.random.default_rng(seed), block_size)
        generator = torch.Generator().manual_seed(seed)
        shape = (1, len(batch.tags.copy), 8)
        draw = lambda heads: torch.randn(shape[0], heads, *shape[1:], generator=generator, dtype=torch.double)  # noqa: B023, E731
        inputs = [draw(heads).requires_grad_() for heads in (4, kv_heads, kv_heads)]
        weight = torch.randn(1, shape[1], 4, 8, generator=generator, dtype=torch.double)
        found = []
        for plan in (PartsPlan(batch.tags, batch.looks), dense_plan(batch.tags)):
            out = plan.attend(0, *inputs, 0.3)
            found.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
        for mine, dense in zip(*found, strict=True):
            torch.testing.assert_close(mine, dense, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("block_size", (4, 0))
def test_the_flex_mask_is_the_dense_mask(block_size):
    batch = random_pack(np.random.default_rng(1), block_size)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, len(batch.tags.copy), 16, generator=generator) for h in (4, 2, 2))
    with torch.no_grad():
        found, dense = (plan.attend(0, query, key, value, 0.25) for plan in (FlexPlan(batch.tags), dense_plan(batch.tags)))
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-5)


def test_sharing_a_prompt_changes_nothing_but_the_number_of_tokens():
    model, tokenizer = tiny("block")
    prompt = prompts(tokenizer, 3)[2]
    records, _ = sample(model, [prompt] * 4, max_tokens=14)
    found, tokens = [], []
    for shared in (False, True):
        packed, rollout = packed_replay(model, records, [0] * 4 if shared else None)
        found.append(score(model, packed))
        tokens.append(packed.input_ids.shape[1])
    torch.testing.assert_close(*found, rtol=0, atol=2e-6)
    assert tokens[0] - tokens[1] == 3 * (len(prompt) // 4 * 4) > 0
    assert np.abs(found[1].numpy() - rollout).max() <= 1e-5


def packed_replay(model, records, groups=None):
    """(batch, recorded log-probabilities in the order of its scored tokens)."""
    pieces, slots, rollout, count = [], [], [], 0
    for record in records:
        rows = plan_replay(record)
        pieces.append(
            make_piece(
                record.prompt_ids, record.response_ids, rows.masked, rows.scored, block_size=record.block_size,
                mask_id=model.spec.mask_token_id, logit_shift=model.spec.logit_shift,
            )
        )  # fmt: skip
        slots.append(pieces[-1].slot + count)
        rollout.append(np.broadcast_to(record.at_commit("logp"), rows.scored.shape)[rows.scored])
        count += len(rollout[-1])
    batch = pack(pieces, slots, groups).to(model.device)
    return batch, np.concatenate(rollout)[batch.slot.cpu().numpy()]


def score(model, batch, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logp, _ = model(batch.input_ids, batch.position_ids, batch.plan(), batch.index, batch.targets, temperature)
    return logp.cpu()


def replay(model, records, batch_size: int) -> np.ndarray:
    """|learner - rollout| of every scored token, packed `batch_size` trajectories at a time."""
    gaps = []
    for start in range(0, len(records), batch_size):
        chosen = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        batch, rollout = packed_replay(model, chosen)
        gaps.append(np.abs(score(model, batch, records[0].decoder["temperature"]).numpy() - rollout))
    return np.concatenate(gaps)


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("decoder", [{}, {"select": "threshold", "threshold": 0.3}, {"tokens_per_step": 2, "temperature": 0.7}])
def test_replay_reproduces_the_rollouts_log_probabilities(kind, decoder):
    model, tokenizer = tiny(kind)
    records, _ = sample(model, prompts(tokenizer, 10), max_tokens=14, **decoder)
    gaps = replay(model, records, 4)
    assert len(gaps) == sum(r.valid_len for r in records)
    assert gaps.max() <= 1e-5


def test_replay_with_shifted_logits():
    model, tokenizer = tiny("full")
    shifted = with_spec(model, logit_shift=1)
    records, _ = sample(shifted, prompts(tokenizer, 6), max_tokens=9)
    plain, _ = sample(model, prompts(tokenizer, 6), max_tokens=9)
    assert any((a.response_ids != b.response_ids).any() for a, b in zip(records, plain, strict=True))
    assert replay(shifted, records, 6).max() <= 1e-5


def test_block_cache_equals_the_full_forward():
    """Logits of the last block: cached decoding against one forward with the block-causal mask, no cache."""
    model, tokenizer = tiny("block")
    records, _ = sample(model, prompts(tokenizer, 4), max_tokens=12)
    for record in records:
        ids = torch.tensor(np.concatenate([record.prompt_ids, record.response_ids]), dtype=torch.long)[None]
        last = record.response_len - 4
        steps = record.step_map()[last:]
        final = int(np.argmax(steps))  # before the last commit only this position is masked
        ids[0, record.prompt_len + last + final] = model.spec.mask_token_id
        position = torch.arange(ids.shape[1])[None]
        mask = (position.unsqueeze(-1) // 4) >= (position.unsqueeze(-2) // 4)
        with torch.no_grad():
            hidden = model.hidden(ids, position, DensePlan(mask))[0, record.prompt_len + last + final]
            logp = torch.log_softmax(model.logits(hidden[None]), -1)[0]
        assert abs(logp[record.response_ids[last + final]] - record.at_commit("logp")[last + final]) < 1e-5


def test_entropies_are_there_if_asked_for_and_carry_gradients_if_wanted():
    model, _ = tiny("full")
    masked = np.array([[True, True, False]])
    piece = make_piece(np.array([4, 5]), np.array([6, 7, 8]), masked, masked, block_size=0, mask_id=model.spec.mask_token_id)
    batch = pack([piece], [piece.slot])
    inputs = (batch.input_ids, batch.position_ids, batch.plan(), batch.index, batch.targets)
    assert model(*inputs)[1] is None
    value, grad = model(*inputs, entropy="value")[1], model(*inputs, entropy="grad")[1]
    logits = model.logits(model.hidden(*inputs[:3]).flatten(0, 1)[batch.index])
    torch.testing.assert_close(value, torch.distributions.Categorical(logits=logits).entropy())
    assert not value.requires_grad and grad.requires_grad and torch.equal(value, grad.detach())
    parameter = next(model.parameters())
    assert torch.isfinite(torch.autograd.grad(grad.sum(), parameter)[0]).all()
