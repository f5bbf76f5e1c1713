"""Cache policies: which positions of a canvas a step forwards. The others keep the keys and values of their last forward.

A policy is exact if every row sees the keys and values that a forward of the whole canvas would give it. Block attention makes
that possible (a finished block sees nothing behind it); under full attention only forwarding everything is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from rlpipe.errors import ConfigError

if TYPE_CHECKING:  # a canvas is made for a decoder, and a decoder has a cache policy
    from rlpipe.sampling.canvas import Canvas


class StepRows(NamedTuple):
    """rows bool [n, W]: positions to forward · ready bool [n]: slots that denoise in this step; the others prefill or wait ·
    clean int64 [n]: positions below are final and stored once the forward is done."""

    rows: torch.Tensor
    ready: torch.Tensor
    clean: torch.Tensor


class CachePolicy:
    """exact: see the module · keeps: keys and values of every layer outlive a step."""

    exact: ClassVar[bool] = False
    keeps: ClassVar[bool] = True

    def step_rows(self, canvas: Canvas, order_noise: torch.Tensor) -> StepRows:
        """order_noise float64 [n, B]: the noise that a random order goes by, over the active window."""
        ready = ~canvas.paused
        rows = self.rows(canvas, order_noise) | canvas.refresh.unsqueeze(1)
        return StepRows(rows & canvas.within(0, canvas.end) & ready.unsqueeze(1), ready, canvas.clean)

    def rows(self, canvas: Canvas, order_noise: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class NoCache(CachePolicy):
    """The whole canvas every step."""

    exact: ClassVar[bool] = True
    keeps: ClassVar[bool] = False

    def rows(self, canvas, order_noise):
        return canvas.within(0, canvas.end)


@dataclass(frozen=True)
class BlockExact(CachePolicy):
    """Block attention: prompts are prefilled in whole blocks, at most about `prefill_rows` rows of them a step beside the slots
    that denoise; a finished block is committed by the first step of the next one, which forwards both (they share a forward
    and the finished one never sees the other)."""

    exact: ClassVar[bool] = True
    prefill_rows: int = 4096

    def step_rows(self, canvas: Canvas, order_noise: torch.Tensor) -> StepRows:
        size = canvas.spec.block_size
        pending = canvas.block_start - canvas.clean
        stopped = canvas.paused | canvas.waiting
        grant = torch.where(stopped, 0, pending)
        long = torch.where(pending > size, grant, 0)
        before = long.cumsum(0) - long
        room = (max(self.prefill_rows, size) - before).clamp_min(0) // size * size
        grant = torch.where(pending > size, torch.minimum(grant, room), grant)
        ready = (grant == pending) & ~stopped
        until = torch.where(ready, canvas.block_end, canvas.clean + grant)
        return StepRows(canvas.within(canvas.clean, until), ready, torch.where(ready, canvas.block_start, until))


@dataclass(frozen=True)
class Prefix(CachePolicy):
    """Fast-dLLM's prefix cache (arXiv 2505.22618): everything at the first step of a block, then from the block on."""

    def rows(self, canvas, order_noise):
        return canvas.opening.unsqueeze(1) | (canvas.column >= canvas.block_start.unsqueeze(1))


@dataclass(frozen=True)
class Dual(CachePolicy):
    """Fast-dLLM's dual cache: everything at the first step of a block, then the block alone. refresh near: only the first
    block's opening forwards everything, later ones the block before and the new one."""

    refresh: str = "canvas"

    def __post_init__(self) -> None:
        if self.refresh not in ("canvas", "near"):
            raise ConfigError(f"decoder.options.refresh={self.refresh}: the dual cache refreshes the 'canvas' or 'near'")

    def rows(self, canvas, order_noise):
        block = canvas.within(canvas.block_start, canvas.block_end)
        if self.refresh == "canvas":
            return block | canvas.opening.unsqueeze(1)
        near = canvas.within(canvas.previous_start, canvas.block_end) & canvas.opening.unsqueeze(1)
        return block | near | (canvas.step == 0).unsqueeze(1)


@dataclass(frozen=True)
class Vicinity(CachePolicy):
    """The block and its neighbourhood (dInfer): everything in the first `warmup` steps, at a block's opening and every `every`
    steps (0: never), otherwise the block with `back` positions before and `ahead` behind it."""

    back: int = 16
    ahead: int = 16
    every: int = 0
    warmup: int = 4

    def rows(self, canvas, order_noise):
        whole = canvas.opening | (canvas.step < self.warmup)
        if self.every:
            whole = whole | (canvas.step % self.every == 0)
        return whole.unsqueeze(1) | canvas.within(canvas.block_start - self.back, canvas.block_end + self.ahead)


@dataclass(frozen=True)
class EveryK(CachePolicy):
    """Everything every `every` steps, otherwise the active block."""

    every: int = 4

    def rows(self, canvas, order_noise):
        return (canvas.step % self.every == 0).unsqueeze(1) | canvas.within(canvas.block_start, canvas.block_end)


@dataclass(frozen=True)
class DelayedDecode(CachePolicy):
    """dKV-Cache decode: a token's keys and values are kept from the second forward that sees it as a token;
    everything at a block's opening and every `every` steps."""

    every: int = 8

    def rows(self, canvas, order_noise):
        whole = canvas.opening | (canvas.step % self.every == 0)
        return whole.unsqueeze(1) | ~(canvas.settled_before() | canvas.is_prompt())


@dataclass(frozen=True)
class DelayedGreedy(CachePolicy):
    """dKV-Cache greedy: only what was just decoded, what is next in the random order, and `window` positions around them;
    everything every `every` steps. Needs an order that is known before the forward: decoder.score=random."""

    every: int = 2
    window: int = 4

    def rows(self, canvas, order_noise):
        near = canvas.just_decoded() | canvas.next_in_order(order_noise)
        width = self.window // 2
        near = torch.nn.functional.max_pool1d(near.float().unsqueeze(1), 2 * width + 1, 1, width).squeeze(1) > 0
        return near | (canvas.step % self.every == 0).unsqueeze(1)


CACHES: dict[str, type[CachePolicy]] = {
    "none": NoCache,
    "block": BlockExact,
    "prefix": Prefix,
    "dual": Dual,
    "vicinity": Vicinity,
    "every": EveryK,
    "dkv_decode": DelayedDecode,
    "dkv_greedy": DelayedGreedy,
}
