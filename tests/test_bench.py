"""The bench: baselines that give the engine's tokens, a report that is whole, arguments that are checked. Nothing is timed."""

import json

import numpy as np
import pytest
import torch
from tiny_models import tiny, with_spec

from rlpipe.bench import __main__ as entry
from rlpipe.bench import baselines
from rlpipe.bench.memory import PeakMemory
from rlpipe.bench.rollout import agreement
from rlpipe.bench.roofline import roofline
from rlpipe.bench.settings import RolloutSettings, read
from rlpipe.config import DecoderConfig
from rlpipe.errors import ConfigError
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.request import Request

SHAPES = ((2, 9), (4, 5), (7, 16), (1, 1), (13, 12), (8, 3))  # prompt and response lengths, on and off the grid of 4
REPORT = {
    "tokens_per_s", "sequential_tokens_per_s", "lockstep_tokens_per_s", "ratio_vs_sequential", "ratio_vs_lockstep",
    "forwards_per_token", "rows_per_token", "head_rows_per_token", "host_syncs_per_step", "peak_memory_bytes", "identical",
    "agreement", "exact", "tokens", "seconds", "settings", "machine", "versions",
}  # fmt: skip
DECODERS = {
    "static": {},
    "two at a time": {"tokens_per_step": 2},
    "threshold": {"select": "threshold", "threshold": 0.5},
    "sampled": {"temperature": 1.0, "score": "sampled_prob", "top_k": 5},
}


def requests(shapes=SHAPES) -> list[Request]:
    rng = np.random.default_rng(5)
    return [
        Request(prompt_ids=rng.integers(5, 20, prompt).astype(np.int32), uid=f"p{i}", sample=0, seed=i, max_tokens=limit)
        for i, (prompt, limit) in enumerate(shapes)
    ]


def engine(model, wanted, decoder):
    found, _ = Engine(model).sample(wanted, decoder=decoder, version=0)
    return [t.response_ids[: t.valid_len].tolist() for t in found]


def baseline(model, wanted, decoder, batch):
    found, work = baselines.run(model, wanted, decoder, batch)
    return [tokens.tolist() for tokens in found], work


@pytest.mark.parametrize("batch", [1, 4, len(SHAPES)])
@pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize("kind", ["block", "full"])
def test_baselines_give_the_tokens_of_the_engine(kind, settings, batch):
    model, _ = tiny(kind)
    settings = {"temperature": 0.0, "block_size": 4} | settings
    decoder = Decoder.resolve(DecoderConfig(**settings), model.spec)
    found, _ = baseline(model, requests(), decoder, batch)
    assert found == engine(model, requests(), decoder)
    assert model.lm.config._attn_implementation == "rlpipe"


@pytest.mark.parametrize("kind", ["block", "full"])
def test_baselines_stop_at_eos_like_the_engine(kind):
    model, _ = tiny(kind)
    decoder = Decoder.resolve(DecoderConfig(temperature=0.0), model.spec)
    common = np.bincount(np.concatenate(engine(model, requests(), decoder))).argmax()
    model = with_spec(model, eos_token_ids=(int(common),))
    ours = engine(model, requests(), decoder)
    assert any(len(tokens) < request.max_tokens for tokens, request in zip(ours, requests(), strict=True))
    for batch in (1, len(SHAPES)):
        assert baseline(model, requests(), decoder, batch)[0] == ours


def test_logit_shift_and_one_canvas():
    model = with_spec(tiny("full")[0], logit_shift=1)
    decoder = Decoder.resolve(DecoderConfig(temperature=0.0, tokens_per_step=2), model.spec)
    assert baseline(model, requests(), decoder, len(SHAPES))[0] == engine(model, requests(), decoder)


def test_work_is_counted_as_published():
    block, full = tiny("block")[0], tiny("full")[0]
    wanted = requests([(9, 7), (4, 4)])  # the first: 2 blocks of prompt, then 3 masks and 4; the second: 1 block, 4 masks
    _, work = baseline(block, wanted, Decoder.resolve(DecoderConfig(temperature=0.0), block.spec), 1)
    assert (work.forwards, work.rows, work.head_rows) == (1 + 3 + 1 + 4 + 1 + 1 + 4 + 1, 8 + 4 * 9 + 4 + 4 * 5, 4 * 11)
    _, work = baseline(full, wanted, Decoder.resolve(DecoderConfig(temperature=0.0), full.spec), 2)
    assert (work.forwards, work.rows, work.head_rows) == (7, 7 * 2 * 16, 7 * 2 * 16)


def test_stock_attention_is_put_back_after_a_failure():
    lm = tiny("full")[0].lm
    before = dict(vars(lm.config))
    with pytest.raises(ZeroDivisionError), baselines.stock_attention(lm):
        assert lm.model.layers[0].self_attn.config._attn_implementation == "sdpa"
        raise ZeroDivisionError
    assert vars(lm.config) == before


def test_decoders_that_no_baseline_covers_are_refused():
    spec = tiny("full")[0].spec
    with pytest.raises(ConfigError, match="decoder.edit.*baselines=none"):
        baselines.check_covered(Decoder.resolve(RolloutSettings(decoder="wino").decoder_config("full"), spec))


def test_agreement_counts_missing_tokens_as_wrong():
    assert agreement([np.array([1, 2, 3]), np.array([4])], [np.array([1, 5]), np.array([4])]) == 2 / 4


@pytest.mark.parametrize("model", ["tiny:block", "3m:full"])
def test_the_report_is_whole(model, tmp_path, capsys):
    out = tmp_path / "report.json"
    small = ["n=3", "prompt_len=9", "max_tokens=8", "repeat=1", "sequential_n=2", "decoder.tokens_per_step=2", f"out={out}"]
    threads = torch.get_num_threads()
    try:
        assert entry.main(["rollout", f"model={model}", *small]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text())
    assert REPORT <= report.keys()
    assert report["identical"] and report["agreement"] == 1.0 and report["exact"]
    assert report["settings"]["changes"] == {"tokens_per_step": 2}
    assert "engine" in capsys.readouterr().out


def test_without_baselines_nothing_is_compared(tmp_path):
    out = tmp_path / "report.json"
    small = ["model=tiny:full", "decoder=wino", "n=2", "prompt_len=5", "max_tokens=4", "repeat=1", "threads=1", f"out={out}"]
    assert entry.main(["rollout", "baselines=none", *small]) == 0
    report = json.loads(out.read_text())
    assert report["identical"] is None and report["ratio_vs_lockstep"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "rollout"),
        (["rolout"], "did you mean rollout"),
        (["rollout", "promt_len=3"], "did you mean prompt_len"),
        (["rollout", "decoder.treshold=0.5"], "did you mean decoder.threshold"),
        (["rollout", "n=many"], "n=many"),
        (["rollout", "n=0"], "at least 1"),
        (["rollout", "baselines=some"], "both"),
        (["rollout", "fast"], "not key=value"),
        (["rollout", "model=nowhere"], "no such model folder"),
        (["rollout", "model=sdar-4b"], "for a GPU"),
        (["rollout", "model=tiny:block", "decoder=sdar_statik"], "did you mean sdar_static"),
    ],
)
def test_wrong_arguments_are_refused_with_a_remedy(arguments, message, capsys):
    threads = torch.get_num_threads()
    try:
        assert entry.main(arguments) == 2
    finally:
        torch.set_num_threads(threads)
    assert message in capsys.readouterr().err


def test_settings_are_typed():
    settings = read(["peak_tflops=900", "decoder.threshold=1", "decoder.options={gamma: 0.5}", "out=1"])
    assert settings.peak_tflops == 900.0 and settings.out == "1"
    assert settings.changes == {"threshold": 1.0, "options": {"gamma": 0.5}} and type(settings.changes["threshold"]) is float


def test_roofline_by_hand():
    model, _ = tiny("full")  # 2 layers, width 32, 2 heads of 16, MLP 64
    body, head = 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32), 32 * model.lm.config.vocab_size
    floor = roofline(model, forwards=3, rows=10, head_rows=5, slot_steps=6, keys=7.0, tflops=1.0, tbs=2.0)
    assert floor.flop == 10 * (2 * body + 4 * 2 * 2 * 16 * 7) + 2 * 5 * head
    assert floor.bytes == 3 * 4 * (body + head) + 6 * 7 * (2 * 2 * 32 * 4)
    assert floor.seconds == max(floor.flop / 1e12, floor.bytes / 2e12)


def test_peak_memory_sees_an_allocation():
    memory = PeakMemory("cpu")
    torch.ones(16, 2**20).sum()
    assert memory.stop() >= 16 * 2**20 * 4 * 0.9
