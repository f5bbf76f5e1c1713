"""Weights on their way: layouts, digests, the three carriers in one process, adapters merged to the bit."""

import copy
import dataclasses
import os
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import tiny

from rlpipe.errors import ClusterError, WeightMismatch
from rlpipe.learner.engine import Engine
from rlpipe.learner.exporting import ADAPTERS, BASE, BROADCAST, SHARED, WHOLE, Exporter, Order
from rlpipe.models.adapters import add_adapters, merged_parameters
from rlpipe.models.weights import ALIGN, Layout, check_names, combined, digest, pack, view
from rlpipe.transport.meeting import Meeting, reach, runs, serve
from rlpipe.transport.shared import open_slot
from rlpipe.transport.store import Stored
from rlpipe.transport.update import Receiver, WeightUpdate

BUCKET = 10_000  # bytes: a dozen buckets of the tiny model


class PlainEngine(Engine):
    """The export of an engine without DeepSpeed; `gathers` counts as ZeRO 3 would."""

    def __init__(self, model, stage: int = 1):
        self.module, self.rank, self.gathers = SimpleNamespace(module=model), 0, 0
        self.config = SimpleNamespace(zero_stage=stage)

    def gathered(self, parameters):
        self.gathers += self.config.zero_stage == 3
        return nullcontext()


def changed(model, seed: int):
    """A copy with other weights."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model, seed: int = 0):
    """A copy with adapters that do something."""
    model = copy.deepcopy(model)
    add_adapters(model.lm, rank=4, alpha=6.0, dropout=0.0, targets=["q_proj", "down_proj"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.lm.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 7)
    return model


def stored(exporter: Exporter, contents: str, version: int, **fields) -> WeightUpdate:
    """What the driver makes of a rank's `put`, without Ray."""
    layout, scalings = exporter.plan(contents)
    *buckets, receipt = (item.copy() if isinstance(item, np.ndarray) else item for item in exporter.put(contents))
    base = fields.get("base")
    checksum = combined(receipt.digests, base.checksum if base else "")
    return WeightUpdate(version, layout, Stored(tuple(buckets), receipt.digests), checksum, scalings, **fields)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- layouts and digests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", (1, 1_000, 10**9))
def test_a_layout_packs_and_reads_back_any_dtype(bucket_bytes):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(4.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
        "c": torch.randn(400, generator=generator).half(),
    }
    layout = Layout.plan(((name, t.dtype, tuple(t.shape)) for name, t in tensors.items()), bucket_bytes)
    check_names(layout, tensors, 0)
    assert all(size % ALIGN == 0 for size in layout.sizes) and layout.nbytes == sum(layout.sizes)
    assert max(layout.sizes) == layout.largest <= max(bucket_bytes, 832)
    for entries, size in zip(layout.buckets(), layout.sizes, strict=True):
        bucket = torch.full((size,), 255, dtype=torch.uint8)
        pack((tensors[entry.name] for entry in entries), entries, bucket)
        assert all(torch.equal(view(entry, bucket), tensors[entry.name]) for entry in entries)
        assert int((bucket == 255).sum()) <= size // 4, "what lies between tensors is 0, so that equal weights hash alike"


def test_names_shapes_and_dtypes_are_compared():
    layout = Layout.plan([("a", torch.float32, (2, 3)), ("b", torch.float32, (4,))], 100)
    right = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    check_names(layout, right, 1)
    for wrong, found in (
        ({"a": right["a"]}, "differ in 1 parameters, first b"),
        (right | {"c": right["b"]}, "first c"),
        (right | {"a": torch.zeros(3, 2)}, r"a: version 1 has shape \(2, 3\) of float32, the model shape \(3, 2\)"),
        (right | {"b": torch.zeros(4).half()}, "of float32, the model shape .* of float16"),
    ):
        with pytest.raises(WeightMismatch, match=found):
            check_names(layout, wrong, 1)


def reference_digest(data: bytes) -> int:
    """The definition, word by word, in Python's integers."""

    def odd(index: int) -> int:
        x = (index + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return (x ^ (x >> 31)) | 1

    words = np.frombuffer(data, np.uint64).tolist()
    total = 0
    for row in range(0, len(words), 2**16):
        part = sum(word * odd(place) for place, word in enumerate(words[row : row + 2**16]))
        total += part * odd(2**16 + row // 2**16)
    return (total + len(words)) % 2**64


def test_the_digest_is_what_it_says_and_sees_every_bit():
    assert (0xE220A8397B1DCDAF | 1) == 0xE220A8397B1DCDAF  # SplitMix64's published first number, from a state of 0
    one = torch.tensor([1], dtype=torch.int64).view(torch.uint8)
    row_weight = reference_digest(np.array([1], np.uint64).tobytes()) - 1
    assert digest(one) - 1 == row_weight
    rng = np.random.default_rng(0)
    for count in (8, 64, 8 * 2**16, 8 * 2**16 + 64, 3 * 8 * 2**16):
        data = rng.integers(0, 256, count, dtype=np.uint8)
        bucket = torch.from_numpy(data)
        right = digest(bucket)
        assert right == reference_digest(data.tobytes())
        for place in rng.integers(0, count, 20):
            data[place] ^= 1 << int(place) % 8
            assert digest(bucket) != right
            data[place] ^= 1 << int(place) % 8
    zeros = [digest(torch.zeros(64 * n, dtype=torch.uint8)) for n in range(4)]
    assert len(set(zeros)) == 4, "length counts"
    assert combined([1, 2]) != combined([2, 1]) and combined([1], "base") != combined([1])


# --- the worker's side ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bucket_bytes", (1, BUCKET, 10**9))
def test_an_update_arrives_to_the_bit_and_in_place(dtype, bucket_bytes):
    source, target = changed(tiny("block")[0], 1).to(dtype), copy.deepcopy(tiny("block")[0]).to(dtype)
    storage = target.lm.lm_head.weight.data_ptr()
    update, receiver = stored(Exporter(PlainEngine(source), bucket_bytes), WHOLE, 3), Receiver()
    assert receiver.receive(update, target.lm) == (3, update.checksum)
    assert same(source, target) and target.lm.lm_head.weight.data_ptr() == storage
    again = dataclasses.replace(update, carrier=Stored(("gone",), (0,)))
    assert receiver.receive(again, target.lm) == (3, update.checksum), "what is here already is not fetched"
    *buckets, count = receiver.put(3, update.layout, target.lm)
    assert count == len(buckets) and all(np.array_equal(a, b) for a, b in zip(buckets, update.carrier.buckets, strict=True))


def test_a_foreign_update_changes_nothing_and_a_damaged_one_leaves_no_version():
    source, target = changed(tiny("block")[0], 1), copy.deepcopy(tiny("block")[0])
    untouched = copy.deepcopy(target)
    receiver, exporter = Receiver(), Exporter(PlainEngine(source), BUCKET)
    first = stored(exporter, WHOLE, 1)
    foreign = Exporter(PlainEngine(copy.deepcopy(source).half()), BUCKET)
    with pytest.raises(WeightMismatch, match="of float16, the model"):
        receiver.receive(stored(foreign, WHOLE, 1), target.lm)
    assert same(target, untouched)
    receiver.receive(first, target.lm)
    buckets = [bucket.copy() for bucket in first.carrier.buckets]
    buckets[2][7] ^= 1
    before = [p.detach().clone() for p in target.parameters()]
    with pytest.raises(WeightMismatch, match=r"version 2 arrived damaged: bucket 3 of \d+"):
        damaged = dataclasses.replace(first.carrier, buckets=tuple(buckets))
        receiver.receive(dataclasses.replace(first, version=2, carrier=damaged), target.lm)
    assert receiver.version == -1, "half of it may be there: it is of no version"
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True)), "the bad bytes are not"
    with pytest.raises(WeightMismatch, match="damaged: checksum"):
        receiver.receive(dataclasses.replace(first, checksum="0" * 32), target.lm)
    assert receiver.receive(first, target.lm) == (1, first.checksum)
    *buckets, good = receiver.put(0, first.layout, target.lm)
    assert good == 0 and [len(bucket) for bucket in buckets] == [0] * len(first.layout.sizes), "a newer version came"
    putting = receiver.put(1, first.layout, target.lm)
    next(putting)
    target.lm.lm_head.weight.data.mul_(2)
    *buckets, good = putting
    assert 0 < good < len(first.layout.sizes) and len(buckets[-1]) == 0, "while it was being put"


def test_adapters_alone_give_what_a_full_export_gives():
    plain = tiny("block")[0]
    learner, worker, late = adapted(plain), copy.deepcopy(plain), changed(plain, 5)
    exporter = Exporter(PlainEngine(learner), BUCKET)
    base = stored(exporter, BASE, 0)
    receivers = Receiver(), Receiver()
    for version in (1, 2):
        whole = dict((piece.name, piece.tensor()) for piece in merged_parameters(learner.lm))
        update = stored(exporter, ADAPTERS, version, base=base)
        assert update.layout.nbytes < base.layout.nbytes / 3
        assert receivers[0].receive(update, worker.lm) == (version, update.checksum)
        assert all(torch.equal(whole[name], p) for name, p in worker.lm.named_parameters())
        base = dataclasses.replace(base, carrier=Stored(("not fetched twice",) * len(base.layout.sizes), ()))
        update = dataclasses.replace(update, base=base)
        with torch.no_grad():
            for parameter in learner.lm.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.37)
    kept = dataclasses.replace(update, base=stored(exporter, BASE, 0))
    *buckets, _ = receivers[0].put(2, kept.layout, worker.lm)
    kept = dataclasses.replace(kept, carrier=Stored(tuple(buckets), kept.carrier.digests))
    assert receivers[1].receive(kept, late.lm) == (2, kept.checksum)
    assert same(late, worker), "a worker that starts later gets base and adapters, also from another worker"
    assert receivers[1].receive(kept, changed(late, 9).lm)[0] == 2
    receivers[1].receive(stored(Exporter(PlainEngine(changed(plain, 3)), BUCKET), WHOLE, 7), late.lm)
    receivers[1].receive(kept, late.lm)
    assert same(late, worker), "a whole model in between took the base with it"
    receivers[1].forget()
    other = changed(late, 9)
    receivers[1].receive(kept, other.lm)
    assert same(other, worker), "a receiver that forgot takes all of it again"


def test_adapters_of_another_model_are_refused_before_anything_changes():
    plain = tiny("block")[0]
    exporter = Exporter(PlainEngine(adapted(plain)), BUCKET)
    update = stored(exporter, ADAPTERS, 1, base=stored(exporter, BASE, 0))
    target = copy.deepcopy(plain)
    renamed = {f"x.{name}": value for name, value in update.scalings.items()}
    with pytest.raises(WeightMismatch, match="differ in 16 names"):
        Receiver().receive(dataclasses.replace(update, scalings=renamed), target.lm)
    entries = tuple(dataclasses.replace(e, shape=e.shape[::-1]) for e in update.layout.entries)
    turned = dataclasses.replace(update, layout=dataclasses.replace(update.layout, entries=entries))
    with pytest.raises(WeightMismatch, match="adapters of version 1 are for"):
        Receiver().receive(turned, target.lm)
    assert same(target, plain)


# --- broadcast and shared memory ------------------------------------------------------------------------------------------


def send(exporter: Exporter, way, version, receivers, targets, *, contents=WHOLE, timeout_s=20.0, group="g", **more):
    """One version by a carrier to receivers in threads; (the receipt, what each answered or raised)."""
    layout, scalings = exporter.plan(contents)
    expected = more.pop("expected", len(receivers))
    order = Order(
        way=way, contents=contents, version=version, receivers=expected, device="cpu", timeout_s=timeout_s,
        group=group if way == BROADCAST else "",
    )  # fmt: skip
    carrier = exporter.prepare(order, "127.0.0.1")
    update = WeightUpdate(version, layout, more.pop("change", lambda c: c)(carrier), scalings=scalings, **more)
    replies = {}

    def take(place: int) -> None:
        try:
            replies[place] = receivers[place].receive(update, targets[place].lm)
        except Exception as error:
            replies[place] = error

    threads = [threading.Thread(target=take, args=(place,)) for place in range(len(receivers))]
    for thread in threads:
        thread.start()
    receipt = exporter.send(contents)
    for thread in threads:
        thread.join(60)
    return receipt, [replies[place] for place in range(len(receivers))]


@pytest.mark.parametrize("way", (BROADCAST, SHARED))
@pytest.mark.parametrize("stage", (1, 3))
def test_two_receivers_get_version_after_version(way, stage):
    source, receivers = changed(tiny("block")[0], 1), [Receiver(), Receiver()]
    targets = [copy.deepcopy(tiny("block")[0]) for _ in receivers]
    engine = PlainEngine(source, stage)
    exporter = Exporter(engine, BUCKET)
    for version in (4, 5):
        receipt, replies = send(exporter, way, version, receivers, targets)
        assert receipt.error == "" and replies == [(version, combined(receipt.digests))] * 2
        assert all(same(source, target) for target in targets)
        largest = exporter.plan(WHOLE)[0].largest
        assert receipt.peak_bytes <= 2 * largest and receipt.gathers == (len(receipt.digests) if stage == 3 else 0)
        with torch.no_grad():
            source.lm.lm_head.weight.mul_(2)
    assert engine.gathers == (2 * len(receipt.digests) if stage == 3 else 0), "once a bucket"
    groups = {receiver.facts().group for receiver in receivers}
    assert groups == ({"g"} if way == BROADCAST else {""})
    for receiver in receivers:
        receiver._leave()
    exporter.leave()


def test_adapters_go_by_a_carrier_as_well():
    plain = tiny("block")[0]
    learner, worker, receiver = adapted(plain), copy.deepcopy(plain), Receiver()
    exporter = Exporter(PlainEngine(learner), BUCKET)
    receipt, replies = send(exporter, SHARED, 1, [receiver], [worker], contents=ADAPTERS, base=stored(exporter, BASE, 0))
    assert receipt.error == "" and replies[0][0] == 1
    whole = {piece.name: piece.tensor() for piece in merged_parameters(learner.lm)}
    assert all(torch.equal(whole[name], p) for name, p in worker.lm.named_parameters())


@pytest.mark.parametrize("way", (BROADCAST, SHARED))
def test_a_receiver_that_never_comes_costs_a_deadline_and_is_named(way):
    source, receiver, target = changed(tiny("block")[0], 1), Receiver(), copy.deepcopy(tiny("block")[0])
    exporter = Exporter(PlainEngine(source, 3), BUCKET)
    before = copy.deepcopy(target)
    receipt, (reply,) = send(exporter, way, 1, [receiver], [target], expected=2, timeout_s=0.5)
    assert "waited" in receipt.error and "for 2 receivers, 1 came" in receipt.error
    assert isinstance(reply, ClusterError) and receiver.version == -1 and same(before, target)
    assert exporter.engine.gathers == len(exporter.plan(WHOLE)[0].sizes), "the other ranks are not left in a collective"
    receipt, (reply,) = send(exporter, way, 1, [receiver], [target], group="anew")
    assert receipt.error == "" and same(source, target)
    receiver._leave()


@pytest.mark.parametrize("way", (BROADCAST, SHARED))
def test_a_damaged_bucket_ends_the_update_on_both_sides(way, monkeypatch):
    source, target, receiver = changed(tiny("block")[0], 1), copy.deepcopy(tiny("block")[0]), Receiver()
    exporter = Exporter(PlainEngine(source), BUCKET)
    announce = Meeting.announce
    wrong = lambda self, number, value, *where: announce(self, number, value ^ (number == 4), *where)  # noqa: E731
    monkeypatch.setattr(Meeting, "announce", wrong)
    receipt, (reply,) = send(exporter, way, 1, [receiver], [target], timeout_s=5.0)
    assert isinstance(reply, WeightMismatch) and "damaged: bucket 5" in str(reply) and receiver.version == -1
    assert receipt.error, "the sender does not take it for done"
    monkeypatch.undo()
    receipt, (reply,) = send(exporter, way, 2, [receiver], [target], group="anew")
    assert receipt.error == "" and reply == (2, combined(receipt.digests)) and same(source, target)
    receiver._leave()


def test_a_sender_that_is_gone_fails_its_receivers_at_once():
    server, address = serve("127.0.0.1", 30.0)
    meeting = Meeting(reach(address, 30.0), "v", 30.0)
    failed = []
    thread = threading.Thread(target=lambda: failed.append(pytest.raises(ClusterError, meeting.arrive, 1)))
    thread.start()
    other = Meeting(reach(address, 30.0), "v", 30.0)
    while other.keys.add("arrived", 0) == 0:
        time.sleep(0.01)
    del server
    thread.join(10)
    assert not thread.is_alive() and "waited in vain" in str(failed[0].value)
    with pytest.raises(ClusterError, match="the sender is gone"):
        meeting.arrive(2)
    with pytest.raises(ClusterError, match="is not there"):
        reach(address, 0.1)


def test_slots_of_a_process_that_is_gone_are_refused(monkeypatch):
    with pytest.raises(ClusterError, match="cannot be reached"):
        open_slot((2**22 + 1, 3, 64))
    source, target = changed(tiny("block")[0], 1), copy.deepcopy(tiny("block")[0])
    exporter = Exporter(PlainEngine(source), BUCKET)
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    receipt, (reply,) = send(exporter, SHARED, 1, [Receiver()], [target], timeout_s=5.0)
    assert isinstance(reply, ClusterError) and receipt.error


def test_the_dead_of_this_machine_are_known():
    import subprocess

    assert runs(os.getpid()) and not runs(2**22 + 1)
    child = subprocess.Popen(["true"])
    while runs(child.pid):  # it stays as a zombie until somebody asks how it ended
        time.sleep(0.01)
    child.wait()


def test_a_receiver_too_many_is_refused_before_a_byte_is_sent():
    """The sender would take a bucket back when the number it knows of has it, while one more still reads."""
    source, receivers = changed(tiny("block")[0], 1), [Receiver(), Receiver()]
    targets = [copy.deepcopy(tiny("block")[0]) for _ in receivers]
    receipt, replies = send(Exporter(PlainEngine(source), BUCKET), SHARED, 1, receivers, targets, expected=1, timeout_s=5.0)
    assert any("1 receivers were asked, and 2 came" in str(reply) for reply in replies)
    assert receipt.error == "" or "a receiver failed" in receipt.error


def test_ranks_that_were_told_nothing_say_so_and_gather_to_the_end():
    exporter = Exporter(PlainEngine(tiny("block")[0], 3), BUCKET)
    assert "nothing was prepared" in exporter.send(WHOLE).error
    assert exporter.engine.gathers == len(exporter.plan(WHOLE)[0].sizes)
