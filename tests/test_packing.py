"""The visibility rule, the packed layout, and the equality that everything rests on: replay equals rollout."""

import numpy as np
import pytest
import torch
from tiny_models import prompts, sample, tiny, with_spec

from rlpipe.models.attention import DensePlan, visible
from rlpipe.models.packing import collate, pack_rows
from rlpipe.objectives.planner import plan_replay


def reference_ids(prompt_len: int, response_len: int, size: int):
    """Block and copy ids that put our rule on the reference's grid: counted from the response, backwards in the prompt."""
    prompt = [-1 - (prompt_len - 1 - q) // size for q in range(prompt_len)]
    response = [j // size for j in range(response_len)]
    block = torch.tensor([prompt + response + response])
    copy = torch.tensor([[0] * (prompt_len + response_len) + [1 + b for b in response]])
    return block, copy


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
    block, copy = reference_ids(*shape)
    rows = [[int(v) for v in row.ljust(block.shape[1], "0")] for row in V2[shape]]
    assert visible(block, copy)[0].int().tolist() == rows


def test_padding_sees_itself_only_and_sequences_do_not_mix():
    block, copy = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 0, 0, -1]])
    assert visible(block, copy)[0].int().tolist() == [[1, 1, 1, 0]] * 3 + [[0, 0, 0, 1]]
    apart = visible(block, torch.zeros_like(block), torch.tensor([[0, 0, 1, 1]]))
    assert apart[0].int().tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2


def test_a_partial_first_block_is_shown_with_its_prompt_tokens():
    prompt, response = np.array([1, 2, 3, 4, 5]), np.array([6, 7, 8])
    masked = np.array([[True, True, True], [False, True, False]])
    scored = np.array([[True, False, True], [False, True, False]])
    (pack,) = pack_rows(prompt, response, masked, scored, block_size=4, mask_id=99)
    assert pack.input_ids.tolist() == [1, 2, 3, 4] + [5, 99, 99, 99] + [5, 6, 99, 8]
    assert pack.position_ids.tolist() == [0, 1, 2, 3] + [4, 5, 6, 7] * 2
    assert pack.block.tolist() == [0] * 4 + [1] * 8
    assert pack.copy.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert pack.index.tolist() == [5, 7, 10] and pack.targets.tolist() == [6, 8, 7] and pack.slot.tolist() == [0, 1, 2]


def test_only_segments_with_something_to_score_are_packed():
    prompt, response = np.arange(4), np.arange(10, 18)
    scored = np.zeros((2, 8), bool)
    scored[0, 1], scored[1, 6] = True, True
    (pack,) = pack_rows(prompt, response, scored, scored, block_size=4, mask_id=99)
    assert len(pack) == 8 + 4 + 4  # clean blocks 0 and 1, one segment each in blocks 1 and 2
    assert pack_rows(prompt, response, scored & False, scored & False, block_size=4, mask_id=99) == []


def test_off_grid_canvases_are_refused():
    scored = np.ones((1, 3), bool)
    with pytest.raises(ValueError, match="grid"):
        pack_rows(np.arange(4), np.arange(3), scored, scored, block_size=4, mask_id=99)


def replay(model, records, batch_size: int) -> np.ndarray:
    """|learner - rollout| of every scored token, packed `batch_size` trajectories at a time."""
    gaps = []
    for start in range(0, len(records), batch_size):
        packs, slots, rollout, count = [], [], [], 0
        for record in [records[i] for i in range(start, min(start + batch_size, len(records)))]:
            rows = plan_replay(record)
            mine = pack_rows(
                record.prompt_ids, record.response_ids, rows.masked, rows.scored, block_size=record.block_size,
                mask_id=model.spec.mask_token_id, logit_shift=model.spec.logit_shift,
            )  # fmt: skip
            packs += mine
            slots += [pack.slot + count for pack in mine]
            rollout.append(np.broadcast_to(record.at_commit("logp"), rows.scored.shape)[rows.scored])
            count += len(rollout[-1])
        batch = collate(packs, slots, 0).to(model.device)
        temperature = records[0].decoder["temperature"]
        with torch.no_grad():
            logp, _ = model(batch.input_ids, batch.position_ids, batch.plan(), batch.index, batch.targets, temperature)
        gaps.append(np.abs(logp.cpu().numpy() - np.concatenate(rollout)[batch.slot.cpu().numpy()]))
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
