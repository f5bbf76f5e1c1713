"""Every named decoder, run: what it records, whether it depends on its neighbours, whether a learner can replay it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_packing import replay
from tiny_models import prompts, sample, tiny

from rlpipe.config import DecoderConfig
from rlpipe.decoder_presets import PRESETS, decoder_config, preset_settings
from rlpipe.errors import ConfigError, NoStepMap
from rlpipe.models.attention import DensePlan
from rlpipe.sampling.catalogue import page
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.editing import EDITORS, EditView, ReMDM
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.request import Request
from rlpipe.sampling.schedule import MaskGit, TimeGrid
from rlpipe.trajectory import COMMIT, PRESET, REMASK

CASES = [(name, kind) for name, preset in PRESETS.items() for kind in ("block", "full") if preset.attention in ("any", kind)]


def small(name: str, kind: str) -> dict:
    """A preset's settings with numbers that fit canvases of a dozen tokens."""
    settings = preset_settings(name) | {"threshold": 0.4}
    if settings["steps"]:
        settings["steps"] = 4 if kind == "block" or settings["block_size"] else 9
    if settings["block_size"]:
        settings["block_size"] = 5
    return settings


@pytest.mark.parametrize("name, kind", CASES)
def test_a_named_decoder(name, kind):
    model, tokenizer = tiny(kind)
    tokens, budgets = prompts(tokenizer, 6), [13, 9, 13, 4, 1, 11]
    settings = small(name, kind)
    together, counters = sample(model, tokens, budgets=budgets, slots=4, **settings)
    decoder = Decoder.resolve(DecoderConfig(**settings), model.spec)
    assert together[0].decoder["preset"] == name
    for i in (0, 3, 5):
        alone, _ = sample(model, [tokens[i]], [i], budgets=[budgets[i]], **settings)
        np.testing.assert_array_equal(alone[0].response_ids, together[i].response_ids)
        for column in ("step", "position", "token", "kind"):
            np.testing.assert_array_equal(getattr(alone[0].events, column), getattr(together[i].events, column))
    for trajectory in together:
        check_record(trajectory, decoder, model.spec.mask_token_id)
    if decoder.monotone and decoder.replayable:
        assert replay(model, together, 3).max() <= 1e-5
    assert together[0].exact == decoder.replayable == (counters.tokens > 0 and decoder.replayable)


def check_record(trajectory, decoder, mask_id):
    log = trajectory.events
    assert (np.diff(log.step) >= 0).all() and (log.step >= 0).all()
    np.testing.assert_array_equal(trajectory.state(10**6, mask_id), trajectory.response_ids), "the events lead to the end"
    assert (trajectory.response_ids[: trajectory.valid_len] != mask_id).all() and (
        log.token[log.kind == COMMIT] != mask_id
    ).all()
    assert np.isfinite(log.logp).all() and (log.logp <= 0).all() and (log.confidence <= 1 + 1e-6).all()
    assert trajectory.is_monotone() or not decoder.monotone
    if not trajectory.is_monotone():
        with pytest.raises(NoStepMap):
            trajectory.step_map()


@pytest.mark.parametrize("cache", ("prefix", "dual", "vicinity", "every", "dkv_decode"))
def test_a_cache_that_refreshes_every_step_is_exact_and_a_stale_one_is_not(cache):
    """Replay shows the gap of an approximate cache; with a refresh at every step there is none."""
    model, tokenizer = tiny("full")
    tokens = prompts(tokenizer, 5)
    settings = {"cache": cache, "max_tokens": 12, "block_size": 4 if cache != "every" else 0}
    always = {"prefix": {"block_size": 1}, "dual": {"block_size": 1}, "vicinity": {"options": {"every": 1}}}
    exact, _ = sample(model, tokens, max_tokens=12, block_size=4 if cache in ("vicinity", "dkv_decode") else 0)
    fresh, _ = sample(model, tokens, **settings | always.get(cache, {"options": {"every": 1}}))
    stale, counters = sample(
        model, tokens, **settings | {"options": {"vicinity": {"back": 1, "ahead": 1, "warmup": 1}}.get(cache, {})}
    )
    assert not fresh[0].exact and not stale[0].exact
    if cache not in ("prefix", "dual"):
        for i in range(5):
            np.testing.assert_array_equal(exact[i].response_ids, fresh[i].response_ids)
    assert replay(model, fresh, 3).max() <= 1e-5
    assert replay(model, stale, 3).max() > 1e-4, "the gauge sees stale keys"
    assert counters.rows < 5 * 12 * (12 + max(map(len, tokens)))


def test_running_confidence_is_the_published_trace():
    """objectives.md's trace: conf and argmax of three steps, three positions, one commit a step."""
    editor, schedule, opened = EDITORS["rcr"](), MaskGit("linear", 3), torch.tensor([3])
    confidence = [[0.5, 0.3, 0.2], [0.9, 0.8, 0.7], [0.95, 0.8, 0.7]]
    argmax = [[1, 2, 3], [1, 4, 5], [6, 4, 5]]
    canvas, stored, states, kept = torch.full((1, 3), 9), torch.zeros(1, 3), [], []
    for step in range(3):
        fresh = canvas == 9
        canvas = torch.where(fresh, torch.tensor([argmax[step]]), canvas)
        stored = torch.where(fresh, torch.tensor([confidence[step]]), stored)
        left = schedule.left(opened, torch.tensor([step]))
        view = EditView(canvas != 9, fresh, stored, None, torch.zeros(1, 3), left, left, left, opened, schedule)
        canvas = torch.where(editor.remask(view), 9, canvas)
        states.append(canvas[0].tolist())
        kept.append(stored[0].tolist())
    assert states == [[1, 9, 9], [9, 4, 5], [6, 4, 5]]
    np.testing.assert_allclose(kept, [[0.5, 0.3, 0.2], [0.5, 0.8, 0.7], [0.95, 0.8, 0.7]], atol=1e-6)


def test_rcr_opens_earlier_blocks_again_unless_it_is_kept_to_the_block():
    model, tokenizer = tiny("full")
    tokens, settings = prompts(tokenizer, 24), small("rcr", "full") | {"max_tokens": 12}
    published, _ = sample(model, tokens, **settings)
    kept, _ = sample(model, tokens, **settings | {"options": {"scope": "block"}})

    def reopened(trajectories):
        found = 0
        for t in trajectories:
            log, size = t.events, 5
            newest = np.maximum.accumulate(log.position // size)
            found += int(((log.kind == REMASK) & (log.position // size < newest)).sum())
        return found

    assert reopened(published) > 0 == reopened(kept)
    for trajectories in (published, kept):
        for t in trajectories:
            assert (t.events.kind == REMASK).any()


def test_wino_takes_back_less_than_it_gave_and_ends():
    model, tokenizer = tiny("full")
    settings = small("wino", "full") | {"max_tokens": 12, "options": {"wide": 0.05, "back": 0.9}, "block_size": 12}
    trajectories, counters = sample(model, prompts(tokenizer, 12), **settings)
    taken = 0
    for t in trajectories:
        steps = int(t.events.step.max()) + 1
        accepted = np.bincount(t.events.step[t.events.kind == COMMIT], minlength=steps)
        remasked = np.bincount(t.events.step[t.events.kind == REMASK], minlength=steps)
        assert (remasked[1:] < np.maximum(accepted[:-1], 1)).all() and remasked[0] == 0
        taken += remasked.sum()
    assert taken > 0 and counters.head_rows > sum(len(t.events) for t in trajectories) - taken


def test_a_shadow_row_sees_everything_but_its_own_token():
    """Its probability equals that of a dense forward with one more row, masked at that position, which only sees itself."""

    model, tokenizer = tiny("full")
    tokens = prompts(tokenizer, 1)[0]
    decoder = Decoder.resolve(decoder_config("wino", max_tokens=8, options={"wide": 0.0, "most": 4, "back": 0.0}), model.spec)
    session = Engine(model).session([Request(prompt_ids=tokens, uid="p", sample=0, seed=1)], decoder=decoder, version=0)
    seen = []
    probe = session.sampler._shadow_probability
    session.sampler._shadow_probability = lambda *a: seen.append((session.canvas.ids.clone(), probe(*a))) or seen[-1][1]
    with torch.inference_mode():
        session.step()
        before = session.canvas.ids.clone()
        session.step()
        _, probability = seen[-1]
        for column in probability[0].isnan().logical_not().nonzero().squeeze(1).tolist():
            position, width = len(tokens) + column, before.shape[1]
            token = int(before[0, position])
            mask = torch.ones(1, width + 1, width + 1, dtype=torch.bool)
            mask[0, :width, width] = False  # nobody sees the shadow row
            mask[0, width, position] = False  # and it does not see its token
            ids = torch.cat([before, torch.tensor([[model.spec.mask_token_id]])], 1)
            where = torch.cat([torch.arange(width), torch.tensor([position])]).unsqueeze(0)
            hidden = model.hidden(ids, where, DensePlan(mask))[0, width:]
            wanted = torch.softmax(model.logits(hidden), -1)[0, token]
            assert probability[0, column].item() == pytest.approx(wanted.item(), abs=1e-5)
    assert (~probability.isnan()).sum() >= 4


@pytest.mark.parametrize("strategy", ("cap", "rescale", "conf", "loop"))
def test_remdm_rates_keep_the_marginals(strategy):
    """The share of masks after a step is what the schedule says: 1 - α_s = (1 - α_t)(1 - commit) + α_t σ."""
    editor, schedule = ReMDM(strategy=strategy, eta=0.3), TimeGrid(50)
    time = torch.arange(50)
    sigma, commit = editor.rates(schedule, time)
    assert ((sigma >= 0) & (sigma <= 1) & (commit >= 0) & (commit <= 1)).all() and commit[-1] == 1
    if strategy in ("cap", "rescale"):
        before, after = schedule.noise_level(time)
        torch.testing.assert_close(before * (1 - commit) + (1 - before) * sigma, after)
    if strategy == "loop":
        before, _ = schedule.noise_level(time)
        assert (sigma[(before > editor.on) | (before <= editor.off)] == 0).all() and (sigma > 0).any()


@pytest.mark.parametrize("kind", ("block", "full"))
def test_eotp_fills_what_lies_behind_eos(kind):
    model, tokenizer = tiny(kind)
    tokens = prompts(tokenizer, 40)
    trajectories, _ = sample(model, tokens, max_tokens=12, stop="eotp", score="random")
    plain, _ = sample(model, tokens, max_tokens=12, score="random")
    filled = [t for t in trajectories if t.preset().any()]
    assert filled and sum(len(t.events) for t in trajectories) <= 40 * 16
    for t in filled:
        tail = np.flatnonzero(t.preset())
        first = t.valid_len - 1
        assert t.stop == "eos" and tail.min() > first and t.response_ids[first] == tokenizer.eos_token_id
        assert (t.response_ids[tail] == tokenizer.eos_token_id).all()
        assert not (t.loss_mask() & t.preset()).any() and t.loss_mask().sum() == t.valid_len
        drawn = np.flatnonzero((t.response_ids == tokenizer.eos_token_id) & ~t.preset() & (t.step_map() > 0))
        for place in tail:
            assert t.step_map()[place] in t.step_map()[drawn[drawn < place]], "filled at the step of an EOS before it"
    assert replay(model, trajectories, 3).max() <= 1e-5, "the rows show the filled tail from its step on"
    assert sum(t.step_map().max() for t in trajectories) <= sum(t.step_map().max() for t in plain)


@pytest.mark.parametrize("kind", ("block", "full"))
def test_structure_priors_are_shown_and_never_scored(kind):

    model, tokenizer = tiny(kind)
    fixed = {2: 5, 3: 6, 9: 7}
    requests = [
        Request(prompt_ids=ids, uid=str(i), sample=0, seed=i, preset=fixed) for i, ids in enumerate(prompts(tokenizer, 6))
    ]
    decoder = Decoder.resolve(DecoderConfig(max_tokens=12, stop="length"), model.spec)
    trajectories, _ = Engine(model).sample(requests, decoder=decoder, version=0)
    for t in trajectories:
        assert [t.response_ids[k] for k in fixed] == list(fixed.values())
        assert np.flatnonzero(t.preset()).tolist() == sorted(fixed) and not t.loss_mask()[list(fixed)].any()
        assert (t.events.step[t.events.kind == PRESET] == -1).all()
        assert [t.state(0, model.spec.mask_token_id)[k] for k in fixed] == list(fixed.values())
    assert replay(model, trajectories, 3).max() <= 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cache": "dual"}, "block attention can have auto, block"),
        ({"edit": "rcr"}, "scope: block"),
        ({"stop": "prefix"}, "keep whole"),
        ({"select": "bernoulli"}, "time grid"),
        ({"edit": "rcr", "options": {"scope": "page"}}, "'sequence' or in the 'block'"),
        ({"options": {"gama": 1.0}, "select": "entropy_bounded"}, "did you mean gamma"),
        ({"edit": "rcx"}, "did you mean rcr"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Decoder.resolve(DecoderConfig(**changes), tiny("block")[0].spec)


def test_greedy_delayed_caching_needs_an_order():
    with pytest.raises(ConfigError, match="score=random"):
        Decoder.resolve(DecoderConfig(cache="dkv_greedy"), tiny("full")[0].spec)
    with pytest.raises(ConfigError, match="did you mean rcr"):
        decoder_config("rcrr")


def test_the_page_of_decoders_is_current():
    """docs/decoders.md is `python -m rlpipe.sampling.catalogue`."""
    kept = (Path(__file__).resolve().parent.parent / "docs" / "decoders.md").read_text(encoding="utf8")
    assert kept == page(), "write it again: python -m rlpipe.sampling.catalogue > docs/decoders.md"
