"""LoRA through peft: adapters inside the stock modules, so that every forward stays the one that it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from rlpipe.errors import ConfigError

BASE = ".base_layer"  # peft renames an adapted module's weight NAME.weight to NAME.base_layer.weight


def add_adapters(lm: nn.Module, *, rank: int, alpha: float, dropout: float, targets: list[str]) -> None:
    """Freeze `lm` and add trainable adapters to its linear layers named in `targets`, in place. B starts at zero, so that the
    model is unchanged. Raises ConfigError for a target that the model does not have."""
    from peft import LoraConfig, inject_adapter_in_model

    have = {name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in targets if target not in have]
    if unknown or not targets:
        raise ConfigError(f"learner.lora_targets={targets}: linear layers of this model are {', '.join(sorted(have))}")
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, lm)
    _initialize(lm)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_("lora_" in name)


@torch.no_grad()
def _initialize(lm: nn.Module) -> None:
    """A uniform as peft draws it (Kaiming, a = √5), from a generator of our own: the same adapters in every process."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lm.named_parameters():
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_((2 * drawn - 1) * bound)


def has_adapters(lm: nn.Module) -> bool:
    return any(".lora_A." in name for name, _ in lm.named_parameters())


@contextmanager
def without_adapters(lm: nn.Module) -> Iterator[None]:
    """The base model for as long as the context lasts: the reference policy of a LoRA run costs nothing."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
    wanted = {id(p): p.requires_grad for p in lm.parameters()}  # enable_adapters also switches gradients
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in lm.parameters():
            parameter.requires_grad_(wanted[id(parameter)])


@dataclass(frozen=True, slots=True)
class Merged:
    """One tensor of the plain model. parts: a parameter alone, or base, A and B of an adapted layer · scaling: of B A."""

    name: str
    parts: tuple[nn.Parameter, ...]
    scaling: float = 0.0

    @torch.no_grad()
    def tensor(self) -> torch.Tensor:
        """base + scaling · B A; the parts must be whole."""
        if len(self.parts) == 1:
            return self.parts[0]
        return merge(*self.parts, self.scaling)


@torch.no_grad()
def merge(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """base [o, i] + scaling · up [o, r] down [r, i]: what an adapted layer computes with, in one matrix of base's dtype. All
    that merge call this, so that learner, export and rollout agree to the bit."""
    return base + scaling * (up @ down).to(base.dtype)


def merged_parameters(lm: nn.Module) -> list[Merged]:
    """The plain model's tensors, in the order of its parameters."""
    modules = dict(lm.named_modules())
    merged = []
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            continue
        if f"{BASE}.weight" not in name:
            merged.append(Merged(name.replace(BASE, ""), (parameter,)))
            continue
        layer = modules[name.split(BASE)[0]]
        parts = (parameter, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        merged.append(Merged(name.replace(BASE, ""), parts, layer.scaling["default"]))
    return merged


def base_parameters(lm: nn.Module) -> list[Merged]:
    """The plain model's tensors without what the adapters add: frozen, so they are the same as long as a run lasts."""
    return [Merged(merged.name, merged.parts[:1]) for merged in merged_parameters(lm)]


def adapter_parameters(lm: nn.Module) -> list[Merged]:
    """A and B of every adapted layer, one after the other, as NAME:A and NAME:B of the plain model's NAME."""
    found = []
    for merged in merged_parameters(lm):
        if len(merged.parts) > 1:
            found += [Merged(f"{merged.name}:{side}", (part,)) for side, part in zip("AB", merged.parts[1:], strict=True)]
    return found


def scalings(lm: nn.Module) -> dict[str, float]:
    """Of B A, for every adapted tensor of the plain model."""
    return {merged.name: merged.scaling for merged in merged_parameters(lm) if len(merged.parts) > 1}
