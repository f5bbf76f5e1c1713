"""Weights between processes on GPUs: NCCL where there are two, mapped memory (CUDA IPC) on one. Run with `-m gpu`."""

import copy

import pytest
import torch
from tiny_models import tiny

from rlpipe.models.weights import Layout, digest, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BUCKET = 8_000


def test_digests_are_the_same_on_both_devices():
    for size in (64, 8 * 2**16, 8 * 2**16 + 64, 10**6 - 10**6 % 64):
        bucket = torch.randint(0, 256, (size,), dtype=torch.uint8)
        assert digest(bucket) == digest(bucket.cuda())


def test_a_layout_packs_on_the_gpu():
    named = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16()}
    layout = Layout.plan(((name, t.dtype, tuple(t.shape)) for name, t in named.items()), BUCKET)
    here, there = torch.empty(layout.largest, dtype=torch.uint8), torch.empty(layout.largest, dtype=torch.uint8, device="cuda")
    for bucket in (here, there):
        pack(named.values(), layout.entries, bucket)
    assert torch.equal(here, there.cpu())


def receive(queue, order, place: int) -> None:
    """In a process of its own: one update, from an order that came by the queue."""
    from rlpipe.transport.update import Receiver

    torch.cuda.set_device(place)
    model, receiver = copy.deepcopy(tiny("block")[0]).cuda(), Receiver()
    try:
        reply = receiver.receive(order.get(timeout=120), model.lm)
        queue.put((reply, {name: p.detach().cpu() for name, p in model.lm.named_parameters()}))
    except Exception as error:
        queue.put((repr(error), {}))


@pytest.mark.parametrize("way", ("shared", "broadcast"))
def test_a_process_on_a_gpu_receives_to_the_bit(way):
    from test_transport import PlainEngine, changed

    from rlpipe.learner.exporting import WHOLE, Exporter, Order
    from rlpipe.models.weights import combined
    from rlpipe.transport.update import WeightUpdate

    place = 0 if way == "shared" else 1
    if torch.cuda.device_count() <= place:
        pytest.skip("NCCL takes a GPU once, and there is one")
    context = torch.multiprocessing.get_context("spawn")
    queue, orders = context.Queue(), context.Queue()
    process = context.Process(target=receive, args=(queue, orders, place))
    process.start()
    source = changed(tiny("block")[0], 1).cuda()
    exporter = Exporter(PlainEngine(source), BUCKET)
    order = Order(way=way, contents=WHOLE, version=3, receivers=1, device="cuda", group="gpu", timeout_s=120.0)
    update = WeightUpdate(3, exporter.plan(WHOLE)[0], exporter.prepare(order, "127.0.0.1"))
    orders.put(update)
    receipt = exporter.send(WHOLE)
    reply, weights = queue.get(timeout=120)
    process.join(30)
    assert receipt.error == "" and reply == (3, combined(receipt.digests))
    assert all(torch.equal(p.cpu(), weights[name]) for name, p in source.lm.named_parameters())
