"""Rules of a weight map: exact both ways, and silent about names that are not theirs."""

import torch

from rlpipe.models.weight_map import Experts, Fused, Rename, Tied, WeightMap


def test_rules_know_only_their_names():
    tensors = [torch.arange(12.0).view(6, 2) + 100 * i for i in range(6)]
    experts = Experts("b.{layer}.e.gate_up", ("b.{layer}.e.{expert}.gate", "b.{layer}.e.{expert}.up"), 3)
    assert experts.stock("b.1.e.down") is experts.original("b.1.e.3.gate") is experts.original("b.x.e.0.gate") is None
    stacked = experts.stock("b.1.e.gate_up")
    assert stacked.names[:3] == ("b.1.e.0.gate", "b.1.e.0.up", "b.1.e.1.gate")
    one = stacked.make(tensors)
    assert one.shape == (3, 12, 2)
    for i, name in enumerate(stacked.names):
        back = experts.original(name)
        assert back.names == ("b.1.e.gate_up",) and torch.equal(back.make([one]), tensors[i])
    fused = Fused(("q.{part}", "k.{part}", "v.{part}"), "qkv.{part}", (4, 1, 1))
    assert [tuple(fused.stock(n).make(tensors[:1]).shape) for n in ("q.weight", "k.weight")] == [(4, 2), (1, 2)]
    assert fused.stock("q.bias").names == ("qkv.bias",) and fused.stock("o.bias") is None
    weights = WeightMap((Rename("a.{x}", "z.{x}"), fused))
    assert weights.original_names(["a.1", "q.w", "k.w", "v.w", "other"]) == ["z.1", "qkv.w", "other"]
    assert weights.original("z.1.2").names == ("z.1.2",), "a placeholder has no dots"
    assert WeightMap().stock("x").make(tensors[:1]) is tensors[0]


def test_a_tied_head_is_the_embedding_on_both_sides():
    weights = WeightMap((Tied("head", "wte"), Rename("model.embed_tokens.weight", "wte")))
    assert weights.original_names(["model.embed_tokens.weight", "lm_head.weight"]) == ["wte"]
    assert weights.original("head").names == weights.original("wte").names == ("model.embed_tokens.weight",)


def test_placeholders():
    assert Rename("a.{layer}.x", "b.{layer}.x").stock("a.07.x") is None, "layers are written without zeros in front"
    assert Rename("model.{rest}", "net.{rest}").original("net.layers.0.w").names == ("model.layers.0.w",)
    assert Rename("a.b", "c").stock("aXb") is None, "a dot is a dot"
