"""The rollout worker without Ray: its stream, its counters, and what it does when memory is short."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from tiny_models import prompts, tiny

from rlpipe.config import DecoderConfig, ModelConfig
from rlpipe.errors import ConfigError, RolloutFailed, WeightMismatch
from rlpipe.models.loading import load_model, save_model
from rlpipe.models.weights import Layout, combined, digest, pack
from rlpipe.rollout.worker import GONE, RolloutRequest, RolloutWorker, free_memory, slots_that_fit, up_to_eos
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.engine import Engine
from rlpipe.sampling.request import Request
from rlpipe.trajectory import Prompt
from rlpipe.transport.store import Stored
from rlpipe.transport.update import WeightUpdate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = tiny("block")
    path = tmp_path_factory.mktemp("model")
    save_model(model, tokenizer, path, model.lm.state_dict())
    return str(path)


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory):
    model, tokenizer = tiny("full")
    path = tmp_path_factory.mktemp("full_model")
    save_model(model, tokenizer, path, model.lm.state_dict())
    return str(path)


def worker(folder: str, slots: int = 0) -> RolloutWorker:
    made = RolloutWorker(0, folder, ModelConfig(path=folder), threads=1, slots=slots)
    made.version = 7
    return made


def request(samples: int = 3, version: int = 7) -> RolloutRequest:
    asked = tuple(Prompt(uid=f"p{i}", task="t", text=text) for i, text in enumerate(("1+2=", "3*4=12+5=6", "7")))
    return RolloutRequest(prompts=asked, samples=samples, decoder=DecoderConfig(max_tokens=12), version=version, seed=1)


def test_groups_stream_as_they_are_done_and_slots_change_nothing(folder):
    whole = {part.place: part for part in worker(folder).generate(request())}
    parts = list(worker(folder, slots=2).generate(request()))
    assert sorted(part.place for part in parts) == [0, 1, 2] and sorted(whole) == [0, 1, 2]
    for part in parts:
        assert [t.uid for t in part.trajectories] == [f"p{part.place}"] * 3
        assert [t.sample for t in part.trajectories] == [0, 1, 2] and len(part.texts) == 3
        assert part.texts == whole[part.place].texts
        for one, other in zip(part.trajectories, whole[part.place].trajectories, strict=True):
            np.testing.assert_array_equal(one.response_ids, other.response_ids)
    assert sum(part.counters.tokens for part in parts) == sum(t.valid_len for part in parts for t in part.trajectories)
    assert 0 < parts[0].counters.occupancy <= 1 and parts[0].counters.cache_bytes > 0
    first = next(iter(worker(folder, slots=2).generate(request())))
    assert first.counters.forwards < sum(part.counters.forwards for part in parts), (
        "the first group comes before the work is done"
    )


def test_other_weights_are_refused(folder):
    with pytest.raises(WeightMismatch, match="version 7, asked for 8"):
        next(worker(folder).generate(request(version=8)))


def update(folder: str, version: int, scale: float = 1.0) -> WeightUpdate:
    """The folder's weights, times `scale`, in one bucket."""
    parameters = dict(load_model(folder).lm.named_parameters())
    layout = Layout.plan([(name, p.dtype, tuple(p.shape)) for name, p in parameters.items()], 2**30)
    bucket = torch.zeros(layout.sizes[0], dtype=torch.uint8)
    pack([p.detach() * scale for p in parameters.values()], layout.entries, bucket)
    digests = (digest(bucket),)
    return WeightUpdate(version, layout, Stored((bucket.numpy(),), digests), checksum=combined(digests))


def test_weights_arrive_between_units_and_inside_one_between_blocks(folder):
    made = worker(folder)
    assert made.load_weights(update(folder, 8)) == (8, update(folder, 8).checksum)
    parts = made.generate(request(samples=2, version=8))
    first = next(parts)
    assert {v for t in first.trajectories for v in t.versions} == {8}
    replies = []
    loading = threading.Thread(target=lambda: replies.append(made.load_weights(update(folder, 9, 0.5))))
    loading.start()
    while made.offer is None and loading.is_alive():
        time.sleep(0.001)
    rest = list(parts)
    loading.join(10)
    assert replies == [(9, update(folder, 9, 0.5).checksum)] and made.version == 9 and made.offer is None
    seen = [t.versions.tolist() for part in rest for t in part.trajectories]
    assert all(own == sorted(own) and set(own) <= {8, 9} for own in seen), "a block has one version, and it never falls"


def test_an_update_that_finds_no_moment_in_a_unit_is_taken_after_it(folder):
    made = worker(folder)
    made.load_weights(update(folder, 8))
    parts = list(made.generate(request(version=8)))
    assert len(parts) == 3 and made.session is None
    session = made._open(request(version=8))  # a unit that never steps again
    assert session is made.session
    replies = []
    loading = threading.Thread(target=lambda: replies.append(made.load_weights(update(folder, 9))))
    loading.start()
    while made.offer is None:
        time.sleep(0.001)
    made._close("")
    loading.join(10)
    assert replies[0][0] == 9 and made.version == 9


def test_a_newer_update_overtakes_one_that_still_waits(folder):
    made = worker(folder)
    made.load_weights(update(folder, 8))
    made._open(request(version=8))
    replies, refusals = [], []

    def load(version):
        try:
            replies.append(made.load_weights(update(folder, version)))
        except WeightMismatch as error:
            refusals.append(str(error))

    threads = []
    for version in (9, 10):
        threads.append(threading.Thread(target=load, args=(version,)))
        threads[-1].start()
        while made.offer is None or made.offer.update.version != version:
            time.sleep(0.001)
    made._close("")
    for thread in threads:
        thread.join(10)
    assert [version for version, _ in replies] == [10] and "version 9 were not taken" in refusals[0]


def test_what_a_worker_has_already_disturbs_no_unit(folder):
    made = worker(folder)
    made.load_weights(update(folder, 8))
    session = made._open(request(version=8))  # a unit that never steps again: nothing could be taken inside it
    assert made.load_weights(update(folder, 8)) == (8, update(folder, 8).checksum)
    assert made.offer is None and session._update is None
    made.version = -1  # as after an update that failed: what was there before may be half gone
    session = made.session = None
    assert made.load_weights(update(folder, 8))[0] == made.version == 8


def damaged(update: WeightUpdate) -> WeightUpdate:
    bucket = update.carrier.buckets[0].copy()
    bucket[7] ^= 1
    return dataclasses.replace(update, carrier=Stored((bucket,), update.carrier.digests))


def offered(made: RolloutWorker, what: WeightUpdate, told: list) -> threading.Thread:
    """A thread in which `what` waits for its moment in the unit that is open."""

    def load():
        try:
            told.append(made.load_weights(what))
        except WeightMismatch as error:
            told.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    while made.offer is None:
        time.sleep(0.001)
    return thread


def test_damaged_weights_inside_a_unit_are_tried_once_and_end_it(folder):
    made, told = worker(folder, slots=1), []
    made.load_weights(update(folder, 8))
    parts = made.generate(request(samples=2, version=8))
    next(parts)
    thread = offered(made, damaged(update(folder, 9)), told)
    with pytest.raises(WeightMismatch, match="damaged"):
        list(parts)
    thread.join(10)
    assert isinstance(told[0], WeightMismatch) and made.version == -1 and made.offer is None and made.session is None
    assert made.load_weights(update(folder, 9))[0] == 9


def test_damaged_weights_after_a_unit_do_not_undo_it(folder):
    made, told = worker(folder), []
    made.load_weights(update(folder, 8))
    made._open(request(version=8))
    thread = offered(made, damaged(update(folder, 9)), told)
    made._close("")
    thread.join(10)
    assert isinstance(told[0], WeightMismatch) and made.version == -1 and made.offer is None


def test_damaged_weights_are_refused_and_nothing_is_sampled_with_them(folder):
    made = worker(folder)
    with pytest.raises(WeightMismatch, match="damaged"):
        made.load_weights(damaged(update(folder, 8)))
    with pytest.raises(WeightMismatch, match="version -1"):
        next(made.generate(request(version=7)))


def test_a_unit_that_nobody_wants_any_more_ends(folder):
    made = worker(folder, slots=1)
    asked = dataclasses.replace(request(), unit="17")
    parts = made.generate(asked)
    next(parts)
    made.abort("17")
    assert list(parts) == [] and made.session is None and not made.aborted
    assert len(list(made.generate(request()))) == 3


def test_what_does_not_fit_is_refused_with_the_arithmetic():
    model, tokenizer = tiny("block")
    requests = [Request(prompt_ids=ids, uid="p", sample=0, seed=0) for ids in prompts(tokenizer, 4)]
    engine, decoder = Engine(model), Decoder.resolve(DecoderConfig(max_tokens=12), model.spec)
    each = engine.cache_bytes(requests, decoder)
    longest = max(len(r.prompt_ids) for r in requests)
    assert each == 2 * 2 * -(-(longest + 12) // 4) * 4 * 2 * 16 * 4, "K and V, layers, positions, heads, width, bytes"
    _, counters = engine.sample(requests, decoder=decoder, version=0)
    assert counters.cache_bytes == 4 * each
    assert slots_that_fit(engine, requests, decoder, 4, 100 * each) == 4
    assert slots_that_fit(engine, requests, decoder, 4, 3 * each) == 2
    with pytest.raises(RolloutFailed, match=r"needs 0.\d MiB of cache, and 0.0 MiB are free"):
        slots_that_fit(engine, requests, decoder, 4, each / 2)
    assert free_memory(model.device) > 2**20


def test_a_part_carries_the_texts_of_its_predictions(full_folder):
    made = worker(full_folder)
    plain = {part.place: part for part in made.generate(request())}
    eos = made.engine.spec.eos_token_ids
    asked = dataclasses.replace(request(), predictions=1)
    for part in made.generate(asked):
        assert part.texts == plain[part.place].texts and not plain[part.place].step_texts
        assert len(part.step_texts) == len(part.step_index) == len(part.trajectories) == 3
        for t, text, unlike, index in zip(part.trajectories, part.texts, part.step_texts, part.step_index, strict=True):
            assert len(set(unlike)) == len(unlike) and index.dtype == np.int32 and len(index) == len(t.predictions)
            assert sorted(set(index)) == list(range(len(unlike))) and index[0] == 0, "in order of appearance"
            for row, which in zip(t.predictions.tokens, index, strict=True):
                ends = np.flatnonzero(np.isin(row, eos))
                cut = row[: ends[0] + 1] if len(ends) else row
                assert unlike[which] == made.tokenizer.decode(cut.tolist(), skip_special_tokens=True)
            assert unlike[index[-1]] == text, "the last prediction is the answer"
    thin = next(iter(made.generate(dataclasses.replace(request(), predictions=5))))
    assert all(len(t.predictions) <= 4 for t in thin.trajectories)


def test_predictions_need_full_attention(folder):
    with pytest.raises(ConfigError, match="step credit needs full attention"):
        next(worker(folder).generate(dataclasses.replace(request(), predictions=1)))


def test_texts_end_with_the_first_eos():
    tokens = np.array([[4, 9, 5, 9], [9, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3, 8]], np.int32)
    assert up_to_eos(tokens, (8, 9)).tolist() == [[4, 9, GONE, GONE], [9, GONE, GONE, GONE], [1, 2, 3, 4], [1, 2, 3, 8]]
