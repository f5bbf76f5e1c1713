"""Guided decoding: a perfect guide gives its own text in fewer forwards, a useless one costs little and changes nothing."""

import copy
import dataclasses
import json
import math

import guides
import numpy as np
import pytest
import torch
from test_packing import replay
from tiny_models import prompts, sample, tiny, with_spec

from rlpipe import recipe
from rlpipe.bench import __main__ as entry
from rlpipe.config import DecoderConfig, ServerConfig
from rlpipe.decoder_presets import decoder_config, preset_settings
from rlpipe.errors import ConfigError, RolloutFailed, ServerError
from rlpipe.models.packed_attention import dense_plan
from rlpipe.models.visibility import Tags
from rlpipe.sampling.decoder import SELECTS, Decoder, without_guide
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.guidance import agreement, check_tokenizer, next_rest, settle
from rlpipe.sampling.request import Request
from rlpipe.sampling.selection import SELECTORS

GUIDED = preset_settings("freecache_guided")
CORRECTED = preset_settings("freecache_speculative")
PLAIN = GUIDED | {"select": "static", "options": {}}


def test_the_agreed_run_ends_at_the_first_disagreement():
    masked = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    draft = torch.tensor([[5, 6, 7, 8], [9, 6, 9, 8], [5, 6, 9, 8], [5, 9, 9, 8], [9, 9, 9, 9]])
    answer = torch.tensor([[5, 6, 0, 8], [0, 6, 0, 8], [0, 6, 0, 8], [5, 0, 0, 0], [0, 0, 0, 0]])
    agreed, refused = agreement(masked, draft, answer)
    assert agreed.int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert refused.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_the_guide_decides_where_it_is_no_slower():
    rows = [
        ([0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], 1),  # as many: the guide
        ([0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], 0),  # fewer: the plain selector
        ([0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], 0),  # its own token counts, but is no agreement
        ([0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], 0),
        ([0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0], 1),
        ([0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], 0),
        ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], 0),  # nobody has anything
    ]
    commit, agreed, written, wanted, useful = (torch.tensor(column).bool() for column in zip(*rows, strict=True))
    choice = settle((commit, commit), agreed, written)
    assert torch.equal(choice.chosen, wanted) and torch.equal(choice.useful, useful)
    assert torch.equal(choice.written, written & wanted), "a token of its own is written if it decides"
    assert torch.equal(choice.forced, torch.where((wanted == (agreed | written)).all(1)[:, None], choice.written, commit))


@pytest.mark.parametrize("patience", (1, 2, 4))
def test_a_useless_guide_is_asked_ever_more_rarely(patience):
    yes, no = torch.tensor([True]), torch.tensor([False])
    doubt = rest = torch.zeros(1, dtype=torch.int64)
    calls = []
    for step in range(1, 1001):
        asked = rest == 0
        calls += [step] if bool(asked) else []
        doubt, rest = next_rest(doubt, rest, asked, no, yes, patience)
        assert len(calls) <= patience + 1 + math.log2(step)
    assert np.diff(calls)[patience - 1 :].tolist() == [2**k + 1 for k in range(len(calls) - patience)]
    doubt, rest = next_rest(doubt, torch.zeros_like(rest), yes, yes, yes, patience)
    assert not doubt.any() and not rest.any(), "of use once, it is trusted again"
    assert next_rest(doubt, rest + 3, no, no, no, patience)[1].item() == 3, "a slot that does not denoise waits"
    assert not next_rest(doubt + 50, rest, yes, no, yes, 0)[1].any(), "patience 0: always asked"


def even_canvases(tokens, end: int) -> list[int]:
    return [end - len(ids) for ids in tokens]


@pytest.mark.parametrize("kind, changes", [("block", {}), ("full", {}), ("full", {"logit_shift": 1})])
def test_a_perfect_guide_gives_its_greedy_text_in_fewer_forwards(kind, changes):
    """The model read from left to right by one causal function agrees with the first token of every greedy draft."""
    model, tokenizer = tiny(kind)
    model = with_spec(model, **changes)
    tokens, end = prompts(tokenizer, 8), 28
    budgets = even_canvases(tokens, end)
    guide = guides.reader(model, end)
    settings = {"temperature": 0.0, "stop": "length"}
    guided, counters = sample(model, tokens, budgets=budgets, guide=guide, **GUIDED | settings)
    plain, base = sample(model, tokens, budgets=budgets, **PLAIN | settings)
    for i, ids in enumerate(tokens):
        text = guide.text(ids, budgets[i])
        np.testing.assert_array_equal(guided[i].response_ids[: budgets[i]], text)
        np.testing.assert_array_equal(plain[i].response_ids[: budgets[i]], text)
        assert guided[i].step_map().max() <= plain[i].step_map().max()
        assert not guided[i].preset().any() and guided[i].exact and not guided[i].events.forced.any()
    assert counters.forwards < base.forwards and counters.slot_steps < base.slot_steps
    assert counters.guide_calls <= counters.forwards and counters.guide_agreed == sum(len(t.events) for t in guided)
    assert all(len(call) <= len(tokens) for call in guide.calls) and counters.guide_tokens == sum(map(sum, guide.calls))


@pytest.mark.parametrize("kind", ("block", "full"))
def test_a_perfect_guide_ends_where_its_text_does(kind):
    """Its text holds EOS: nothing behind it is decoded, and the forwards fall with it."""
    model, tokenizer = tiny(kind)
    tokens, end = prompts(tokenizer, 24), 40
    budgets = even_canvases(tokens, end)
    guide = guides.random(model.lm.config.vocab_size // 2)
    options = {"correct": True, "patience": 0}
    guided, counters = sample(model, tokens, budgets=budgets, guide=guide, slots=5, **CORRECTED | {"options": options})
    ended = 0
    for ids, budget, t in zip(tokens, budgets, guided, strict=True):
        text = guide.text(ids, budget)
        if tokenizer.eos_token_id in text:
            text, ended = text[: text.index(tokenizer.eos_token_id) + 1], ended + 1
        forbidden = [token for token in text if token in model.spec.forbidden_ids]
        if not forbidden:
            np.testing.assert_array_equal(t.response_ids[: t.valid_len], text)
            assert t.stop == ("eos" if text[-1] == tokenizer.eos_token_id else "length")
    assert ended > 3 and counters.guide_calls <= counters.forwards


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("temperature", (0.0, 1.0, 0.7))
def test_a_guide_that_corrects_writes_its_text_and_is_never_scored(kind, temperature):
    model, tokenizer = tiny(kind)
    tokens, vocabulary = prompts(tokenizer, 8), model.lm.config.vocab_size
    allowed = [i for i in range(vocabulary) if i not in model.spec.forbidden_ids]
    guide = guides.Guide(lambda before: allowed[(7 * before[-1] + len(before)) % len(allowed)])
    settings = {"temperature": temperature, "stop": "length", "max_tokens": 14}
    found, counters = sample(model, tokens, guide=guide, slots=3, **CORRECTED | settings)
    _, base = sample(model, tokens, slots=3, **PLAIN | settings)
    assert counters.forwards + counters.guide_calls <= 2 * base.forwards
    for ids, t in zip(tokens, found, strict=True):
        np.testing.assert_array_equal(t.response_ids[:14], guide.text(ids, 14))
        written, log = t.preset(), t.events
        assert written.any() and not (t.loss_mask() & written).any() and not t.exact
        assert (t.at_commit("forced") == written).all() and (t.step_map() > 0).all() and t.is_monotone()
        assert np.isfinite(log.logp).all() and (log.logp <= 0).all() and (log.logp_t1 < 0).all()
        check_written(model, t, temperature)
    assert counters.guide_written == sum(t.preset().sum() for t in found)
    if temperature:
        scored = [t for t in found if t.loss_mask().any()]
        assert scored and replay(model, scored, 4).max() <= 1e-5, "what was drawn can be replayed"


def check_written(model, trajectory, temperature: float) -> None:
    """The recorded log-probability of a written token is the model's, in the state it was written in."""
    prompt = torch.as_tensor(trajectory.prompt_ids).long()
    size, end = model.spec.block_size, len(prompt) + trajectory.response_len
    where = torch.arange(end)
    block = where // size if size else torch.zeros_like(where)
    plan = dense_plan(Tags(torch.zeros_like(where), torch.zeros_like(where), block, torch.zeros_like(where)))
    for event in np.flatnonzero(trajectory.preset()[trajectory.events.position])[:3]:
        step, position = int(trajectory.events.step[event]), int(trajectory.events.position[event])
        state = torch.as_tensor(trajectory.state(step, model.spec.mask_token_id)).long()
        with torch.inference_mode():
            hidden = model.hidden(torch.cat([prompt, state])[None], where[None], plan)[0, len(prompt) + position]
            logits = model.logits(hidden[None])[0]
        token = int(trajectory.events.token[event])
        assert trajectory.events.logp_t1[event] == pytest.approx(logits.log_softmax(-1)[token].item(), abs=1e-5)
        wanted = (logits / (temperature or 1.0)).log_softmax(-1)[token].item()
        assert trajectory.events.logp[event] == pytest.approx(wanted, abs=1e-5)


PLAIN_RULES = [
    {},
    {"score": "max_prob"},
    {"score": "max_prob", "tokens_per_step": 3},
    {"score": "entropy", "schedule": "even", "steps": 5},
    {"score": "max_prob", "schedule": "cosine", "steps": 4},
    {"score": "max_prob", "options": {"base": "threshold"}, "threshold": 0.4},
    {"score": "max_prob", "options": {"base": "entropy_bounded", "gamma": 2.0}},
]


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("rule", PLAIN_RULES, ids=str)
def test_a_useless_guide_changes_nothing_and_is_soon_left_alone(kind, rule):
    """It never says what a draft can say: every sample is the plain decoder's, event for event."""
    model, tokenizer = tiny(kind)
    tokens, budgets = prompts(tokenizer, 9), [40, 7, 26, 1, 15, 33, 20, 4, 11]
    config = DecoderConfig(**GUIDED | {"stop": "length"} | rule)
    guide = guides.constant(model.spec.mask_token_id)
    run = {"budgets": budgets, "slots": 4}
    guided, counters = sample(model, tokens, guide=guide, **run, **vars(config))
    plain, base = sample(model, tokens, **run, **vars(without_guide(config)))
    for mine, wanted in zip(guided, plain, strict=True):
        for column in ("step", "position", "token", "kind", "logp", "forced"):
            np.testing.assert_array_equal(getattr(mine.events, column), getattr(wanted.events, column))
    assert counters.forwards == base.forwards and counters.guide_agreed == counters.guide_written == 0
    most = sum(4 + 1 + math.log2(t.step_map().max()) for t in guided)
    assert sum(map(len, guide.calls)) <= most, "questions of all requests"
    assert counters.forwards + counters.guide_calls <= 2 * base.forwards


@pytest.mark.parametrize("kind", ("block", "full"))
def test_a_guide_that_corrects_and_is_never_right_is_left_alone_too(kind):
    model, tokenizer = tiny(kind)
    digits, budget = tokenizer("0123456789")["input_ids"], 60
    request = Request(prompt_ids=prompts(tokenizer, 1)[0], uid="p", sample=0, seed=0, bias={digits[0]: -20.0})
    decoder = Decoder.resolve(DecoderConfig(**CORRECTED | {"stop": "length", "max_tokens": budget}), model.spec)
    guide = guides.constant(digits[0])  # no draft says it
    (found,), counters = Engine(model, guide).sample([request], decoder=decoder, version=0)
    assert (found.response_ids[:16] == digits[0]).all() and counters.guide_written == found.preset().sum() == len(guide.calls)
    assert len(guide.calls) <= 16 + 1 + math.log2(counters.forwards) < counters.forwards / 2
    assert not (found.response_ids[~found.preset()] == digits[0]).any()


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("rule", PLAIN_RULES[:5], ids=str)
@pytest.mark.parametrize("options", ({"patience": 0}, {"patience": 1, "correct": True}), ids=str)
def test_a_random_guide_is_never_slower_than_twice_the_plain_decoder(kind, rule, options):
    """One request after another, so that forwards are those of each: no more than without a guide, at most a call each."""
    model, tokenizer = tiny(kind)
    config = DecoderConfig(**GUIDED | {"stop": "length", "max_tokens": 21, "options": options} | rule)
    for seed, ids in enumerate(prompts(tokenizer, 3)):
        guide = guides.random(model.lm.config.vocab_size, seed)
        _, counters = sample(model, [ids], [seed], guide=guide, **vars(config))
        _, base = sample(model, [ids], [seed], **vars(without_guide(config)))
        assert counters.forwards <= base.forwards and counters.guide_calls <= counters.forwards
        assert counters.forwards + counters.guide_calls <= 2 * base.forwards


@pytest.mark.parametrize("kind", ("block", "full"))
@pytest.mark.parametrize("base", ("static", "threshold"))
@pytest.mark.parametrize("correct", (False, True))
def test_a_guided_response_depends_on_no_neighbour(kind, base, correct):
    model, tokenizer = tiny(kind)
    tokens, budgets = prompts(tokenizer, 8), [21, 4, 17, 9, 1, 30, 12, 13]
    options, guide, seeds = {"base": base, "correct": correct, "patience": 1}, guides.reader(model, 30), list(range(40, 48))
    settings = GUIDED | {"options": options, "threshold": 0.4, "score": "left_to_right", "temperature": 0.5, "guide": guide}
    together, counters = sample(model, tokens, seeds, budgets=budgets, slots=3, **settings)
    assert counters.guide_agreed > 0 and 0 < counters.guide_calls < counters.forwards
    for i in (0, 2, 5, 7):
        alone, _ = sample(model, [tokens[i]], [seeds[i]], budgets=[budgets[i]], **settings)
        for column in ("step", "position", "token", "kind", "forced"):
            np.testing.assert_array_equal(getattr(alone[0].events, column), getattr(together[i].events, column))
    if not correct:
        assert replay(model, together, 3).max() <= 1e-5


def test_what_a_request_forbids_the_guide_cannot_write():
    model, tokenizer = tiny("full")
    token, count = 9, model.lm.config.vocab_size
    for said in (token, model.spec.mask_token_id, count + 5):
        forbidden = {token: -math.inf}
        request = Request(prompt_ids=prompts(tokenizer, 1)[0], uid="p", sample=0, seed=0, bias=forbidden)
        decoder = Decoder.resolve(decoder_config("freecache_speculative", max_tokens=9, stop="length"), model.spec)
        found, counters = Engine(model, guides.constant(said)).sample([request], decoder=decoder, version=0)
        assert not np.isin(found[0].response_ids, [token, model.spec.mask_token_id]).any() and counters.guide_written == 0


def test_full_predictions_of_guided_steps_are_the_drafts():
    model, tokenizer = tiny("full")
    tokens = prompts(tokenizer, 3)
    decoder = Decoder.resolve(DecoderConfig(**GUIDED | {"stop": "length", "max_tokens": 9}), model.spec)
    requests = [Request(prompt_ids=ids, uid=str(i), sample=0, seed=i) for i, ids in enumerate(tokens)]
    guide = guides.Guide(lambda before: before[-1])
    found, _ = Engine(model, guide).sample(requests, decoder=decoder, version=0, predictions=1)
    for t in found:
        for step, drafted in zip(t.predictions.step, t.predictions.tokens, strict=True):
            committed = t.step_map() == step + 1
            np.testing.assert_array_equal(drafted[committed], t.response_ids[committed])


def test_without_a_guide_a_guided_decoder_is_refused():
    model, tokenizer = tiny("block")
    decoder = Decoder.resolve(DecoderConfig(select="guided"), model.spec)
    requests = [Request(prompt_ids=prompts(tokenizer, 1)[0], uid="p", sample=0, seed=0)]
    with pytest.raises(ConfigError, match=r"guide\.url=.*guide\.model="):
        Engine(model).sample(requests, decoder=decoder, version=0)
    for preset, message in (("freecache_guided", r"rollout\.decoder\.select=guided.*guide\.url="), ("", "eval.decoder.select")):
        settings = [f"rollout.decoder.preset={preset}"] if preset else ["eval.decoder={select: guided}"]
        with pytest.raises(ConfigError, match=message):
            recipe.check(recipe.load(["recipe=quickstart", *settings]))
    recipe.check(recipe.load(["recipe=quickstart", "rollout.decoder.preset=freecache_guided", "guide.model=folder"]))
    with pytest.raises(ConfigError, match="teach the policy nothing"):
        recipe.check(recipe.load(["recipe=quickstart", "rollout.decoder.preset=freecache_speculative", "guide.model=folder"]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"edit": "wino"}, "an editor brings its own selector"),
        ({"options": {"base": "treshold"}}, r"options\.base=treshold.*did you mean threshold"),
        ({"options": {"base": "guided"}}, "known are static"),
        ({"options": {"patients": 3}}, "did you mean patience"),
        ({"options": {"patience": -1}}, "a number of steps"),
        ({"options": {"correct": "yes"}}, "true or false"),
        ({"cache": "dkv_greedy", "score": "random"}, "drafts the whole window"),
    ],
)
def test_guided_decoders_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Decoder.resolve(DecoderConfig(select="guided", **changes), tiny("full")[0].spec)


def test_the_plain_decoder_behind_a_guided_one():
    config = DecoderConfig(select="guided", options={"base": "entropy_bounded", "gamma": 0.5, "patience": 3, "correct": True})
    assert without_guide(config) == DecoderConfig(select="entropy_bounded", options={"gamma": 0.5})
    assert without_guide(DecoderConfig()) == DecoderConfig() and set(SELECTS) == {"guided", *SELECTORS}
    decoder = Decoder.resolve(dataclasses.replace(config, options={"patience": 3}), tiny("block")[0].spec)
    assert decoder.settings()["guidance"] == {"kind": "Guidance", "base": "static", "correct": False, "patience": 3}
    assert not decoder.state_only and decoder.replayable
    assert "guidance" not in Decoder.resolve(DecoderConfig(), tiny("block")[0].spec).settings()


@pytest.mark.parametrize("model", ("tiny:full", "tiny:block"))
def test_the_bench_shows_both_bounds(model, tmp_path, capsys):
    out = tmp_path / "guided.json"
    sizes = ["n=3", "prompt_len=12", "max_tokens=20", "repeat=1", "threads=1", "patience=2"]
    assert entry.main(["guided", f"model={model}", *sizes, f"out={out}"]) == 0
    results = json.loads(out.read_text())["results"]
    plain, perfect, useless = (results[name] for name in ("plain", "perfect", "useless"))
    assert perfect["same_text"] and useless["same_text"] and perfect["forwards"] < plain["forwards"] == useless["forwards"]
    for result in results.values():
        assert result["forwards"] + result["guide_calls"] <= 2 * plain["forwards"]
        assert result["tokens"] == plain["tokens"]
    assert "both/plain" in capsys.readouterr().out


def test_a_guide_behind_a_server():
    """The same samples as with the guide in this process; a server that fails ends the unit of work with its cause."""
    from openai_server import OpenAIServer

    from rlpipe.serving.client import Client

    model, tokenizer = tiny("full")
    tokens, end = prompts(tokenizer, 4), 22
    guide = guides.reader(model, end)
    settings = GUIDED | {"temperature": 0.0, "budgets": even_canvases(tokens, end)}
    here, counters = sample(model, tokens, guide=guide, **settings)
    with OpenAIServer(next_token=lambda before: guide.next_token(tuple(before))) as server:
        client = Client(ServerConfig(url=server.url), "the guide")
        there, others = sample(model, tokens, guide=client, **settings)
        assert sum("prompt_logprobs" in body for body in server.asked) == others.guide_calls == counters.guide_calls
        for mine, theirs in zip(here, there, strict=True):
            np.testing.assert_array_equal(mine.response_ids, theirs.response_ids)
            np.testing.assert_array_equal(mine.events.step, theirs.events.step)
        server.fault = 400
        with pytest.raises(ServerError, match="the guide"):
            sample(model, tokens, guide=client, **settings)
        client.close()


def test_a_guide_with_another_tokenizer_is_refused():
    _, tokenizer = tiny("block")
    guide = guides.constant(3)
    assert not check_tokenizer(guide, tokenizer, 1.0), "it cannot be asked"
    guide.tokenize = lambda text, timeout_s: tokenizer(text, add_special_tokens=False)["input_ids"]
    assert check_tokenizer(guide, tokenizer, 1.0)
    guide.tokenize = lambda text, timeout_s: [ord(character) for character in text]
    with pytest.raises(ConfigError, match="another tokenizer than the model: 'The answer is 42.'"):
        check_tokenizer(guide, tokenizer, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ("block", "full"))
def test_guided_samples_on_the_gpu_are_the_cpus(kind):
    model, tokenizer = tiny(kind)
    tokens = prompts(tokenizer, 12)
    settings = CORRECTED | {"temperature": 0.0, "max_tokens": 12, "stop": "length"}
    here, _ = sample(model, tokens, **settings)
    there, _ = sample(copy.deepcopy(model).cuda(), tokens, **settings)
    assert sum(map(np.array_equal, (t.response_ids for t in here), (t.response_ids for t in there))) >= 10


@pytest.mark.parametrize("answer", ([], [[3]], [[3] * 50]))
def test_an_answer_of_another_shape_is_refused(answer):
    model, tokenizer = tiny("full")

    class Odd:
        def greedy_next(self, tokens, *, timeout_s):
            return [np.array(row, np.int32) for row in answer]

    decoder = Decoder.resolve(DecoderConfig(select="guided"), model.spec)
    requests = [Request(prompt_ids=prompts(tokenizer, 1)[0], uid="p", sample=0, seed=0)]
    with pytest.raises(RolloutFailed, match="after every position"):
        Engine(model, Odd()).sample(requests, decoder=decoder, version=0)
