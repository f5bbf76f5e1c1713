"""Full predictions of a rollout: what is recorded, that recording changes nothing, and who has none to record."""

import numpy as np
import pytest
import torch
from tiny_models import prompts, sample, tiny, with_spec

from rlpipe.config import DecoderConfig
from rlpipe.errors import ConfigError
from rlpipe.models.attention import DensePlan
from rlpipe.sampling import predictions as recording
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.noise import TOKEN, uniform
from rlpipe.sampling.request import Request
from rlpipe.sampling.statistics import row_statistics
from rlpipe.trajectory import COMMIT, PRESET, Trajectories

DECODERS = {
    "one canvas": {},
    "blocks": {"block_size": 4, "tokens_per_step": 2},
    "greedy": {"block_size": 4, "temperature": 0.0},
    "threshold": {"block_size": 4, "select": "threshold", "threshold": 0.3},
    "rcr": {"edit": "rcr", "schedule": "linear", "steps": 4},
    "rcr over blocks": {"edit": "rcr", "schedule": "linear", "steps": 4, "block_size": 5},
    "wino": {"edit": "wino", "options": {"wide": 0.05, "back": 0.9}, "block_size": 6},
    "fused": {"fuse": "credit", "block_size": 4},
    "stable": {"select": "stable", "block_size": 4},
    "eotp": {"stop": "eotp", "score": "random"},
    "length": {"stop": "length", "block_size": 4, "tokens_per_step": 3},
}


def recorded(model, tokens, every: int = 1, slots: int = 0, budgets=None, preset=None, **decoder):
    """Trajectories with predictions, and the engine's counters."""
    settings = Decoder.resolve(DecoderConfig(**decoder), model.spec)
    budgets = [0] * len(tokens) if budgets is None else budgets
    requests = [
        Request(prompt_ids=ids, uid=f"p{i}", sample=0, seed=i, max_tokens=budget, preset=preset or {})
        for i, (ids, budget) in enumerate(zip(tokens, budgets, strict=True))
    ]
    return Engine(model).sample(requests, decoder=settings, version=0, slots=slots, predictions=every)


@pytest.mark.parametrize("shift", (0, 1))
@pytest.mark.parametrize("name", DECODERS)
def test_recording_changes_nothing_and_agrees_with_the_rollout(name, shift):
    model, tokenizer = tiny("full")
    model = with_spec(model, logit_shift=shift)
    tokens, budgets, how = prompts(tokenizer, 9), [11, 5, 12, 3, 8, 7, 1, 2, 9], DECODERS[name]
    if shift and name == "wino":
        pytest.skip("a shifted model has no shadow rows")
    plain, before = sample(model, tokens, budgets=budgets, slots=4, **how)
    found, after = recorded(model, tokens, budgets=budgets, slots=4, **how)
    assert after.forwards == before.forwards and after.rows == before.rows
    assert (after.head_rows > before.head_rows) == ("block_size" in how)
    for t, want in zip(found, plain, strict=True):
        np.testing.assert_array_equal(t.response_ids, want.response_ids)
        for column in ("step", "position", "token", "kind", "forced"):
            np.testing.assert_array_equal(getattr(t.events, column), getattr(want.events, column))
        np.testing.assert_allclose(t.events.logp, want.events.logp, atol=2e-6)
        agree(t)


def agree(t) -> None:
    """Committed tokens and confidences are the prediction's; what is not masked is the state's."""
    made, log = t.predictions, t.events
    assert made.step.tolist() == list(range(int(log.step.max()) + 1)) and made.tokens.shape[1] == t.response_len
    for step, tokens, confidence in zip(made.step, made.tokens, made.confidence, strict=True):
        state = t.state(step, -1)
        np.testing.assert_array_equal(tokens[state != -1], state[state != -1])
        np.testing.assert_array_equal(confidence > 0, state == -1)
        drawn = (log.step == step) & (log.kind == COMMIT)
        np.testing.assert_array_equal(tokens[log.position[drawn]], log.token[drawn])
        np.testing.assert_array_equal(confidence[log.position[drawn]], log.confidence[drawn])
    committed = t.state(made.step[-1] + 1, -1) != -1
    committed &= ~t.preset()
    np.testing.assert_array_equal(made.tokens[-1][committed], t.response_ids[committed])
    if t.decoder["stop"] == "length":
        np.testing.assert_array_equal(made.tokens[-1], t.response_ids)


@pytest.mark.parametrize("shift", (0, 1))
def test_predictions_behind_the_block_are_those_of_a_dense_forward(shift):
    """Each masked position is drawn from the model's law with the noise of (seed, position, step)."""
    model, tokenizer = tiny("full")
    model = with_spec(model, logit_shift=shift)
    tokens = prompts(tokenizer, 3)
    found, _ = recorded(model, tokens, max_tokens=9, block_size=3, temperature=0.7)
    for seed, t in enumerate(found):
        for step, drawn, confidence in zip(t.predictions.step, t.predictions.tokens, t.predictions.confidence, strict=True):
            state = t.state(step, model.spec.mask_token_id)
            masked = torch.as_tensor(np.flatnonzero(state == model.spec.mask_token_id)) + t.prompt_len
            ids = torch.as_tensor(np.concatenate([t.prompt_ids, state])).long().unsqueeze(0)
            where = torch.arange(ids.shape[1]).unsqueeze(0)
            with torch.inference_mode():
                hidden = model.hidden(ids, where, DensePlan(torch.ones(1, len(where[0]), len(where[0]), dtype=torch.bool)))[0]
                noise = uniform(torch.tensor(seed), masked, torch.tensor(int(step)), TOKEN)
                want = row_statistics(model.logits(hidden[masked - shift]), noise, 0.7)
            place = masked.numpy() - t.prompt_len
            np.testing.assert_array_equal(drawn[place], want.token.numpy())
            np.testing.assert_allclose(confidence[place], want.p_token.numpy(), atol=1e-6)


@pytest.mark.parametrize("every", (2, 3, 50))
def test_a_stride_keeps_every_so_many_steps_the_first_and_the_last(every, monkeypatch):
    monkeypatch.setattr(recording, "HELD_STEPS", 2)
    model, tokenizer = tiny("full")
    tokens = prompts(tokenizer, 6)
    whole, _ = recorded(model, tokens, max_tokens=11, slots=2)
    thin, _ = recorded(model, tokens, every, max_tokens=11, slots=2)
    for t, full in zip(thin, whole, strict=True):
        last = int(full.predictions.step[-1])
        kept = sorted({*range(0, last + 1, every), last})
        assert t.predictions.step.tolist() == kept
        np.testing.assert_array_equal(t.predictions.tokens, full.predictions.tokens[kept])
        np.testing.assert_array_equal(t.predictions.confidence, full.predictions.confidence[kept])


def test_they_travel_as_columns():
    model, tokenizer = tiny("full")
    found, _ = recorded(model, prompts(tokenizer, 3), max_tokens=10)
    store = Trajectories.of(list(found)).select([2, 0])
    for got, want in zip(store, (found[2], found[0]), strict=True):
        for name in ("step", "tokens", "confidence"):
            np.testing.assert_array_equal(getattr(got.predictions, name), getattr(want.predictions, name))
            assert getattr(got.predictions, name).dtype == getattr(want.predictions, name).dtype
    steps = sum(len(t.predictions) for t in found)
    bare = Trajectories.of(list(sample(model, prompts(tokenizer, 3), max_tokens=10)[0]))
    assert found.nbytes - bare.nbytes == steps * (8 * 10 + 4) + 3 * 4 * 8, "8 bytes a position and 4 a step, and the offsets"


@pytest.mark.parametrize("stop", ("prefix", "eotp"))
def test_an_editor_logs_what_rules_put_there(stop):
    """Structure priors and the tail behind EOS are events of the log, so that states replay."""
    model, tokenizer = tiny("full")
    fixed = {1: 5, 7: 6}
    how = DECODERS["rcr over blocks"] | {"stop": stop, "max_tokens": 12}
    found, _ = recorded(model, prompts(tokenizer, 30), preset=fixed, **how)
    filled = 0
    for t in found:
        agree(t)
        rules = t.events.kind == PRESET
        before = t.events.step == -1
        assert set(t.events.position[before]) == set(fixed) and rules[before].all()
        np.testing.assert_array_equal(t.state(10**6, model.spec.mask_token_id), t.response_ids)
        filled += int((rules & ~before).sum())
    assert (filled > 0) == (stop == "eotp")


@pytest.mark.parametrize(
    "kind, how, message",
    [("block", {}, "step credit needs full attention"), ("full", {"cache": "dual", "block_size": 4}, "decoder.cache=none")],
)
def test_without_full_predictions_nothing_is_recorded(kind, how, message):
    model, tokenizer = tiny(kind)
    with pytest.raises(ConfigError, match=message):
        recorded(model, prompts(tokenizer, 1), **how)
