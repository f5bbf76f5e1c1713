"""The rollout engine: many requests through one packed forward a step.

Block models use an exact block cache. A step forwards the rows [clean, block_end) of every slot: right after admission that
is the prompt and the first block (the prefill), right after a block was finished it is that block with its final tokens and
the next one (the commit, fused), otherwise the active block alone. Full-attention models forward their whole canvas, the
same code with nothing ever clean. The LM head sees only rows whose position is still masked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from rlpipe.models.attention import SlotCache
from rlpipe.models.policy import DiffusionLM
from rlpipe.sampling.canvas import Canvas
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.noise import POSITION_SCORE, TOKEN, uniform
from rlpipe.sampling.record import record
from rlpipe.sampling.request import Request
from rlpipe.sampling.selection import SCORERS, StepView
from rlpipe.sampling.statistics import RowStatistics, row_statistics
from rlpipe.trajectory import Trajectories


@dataclass(slots=True)
class EngineCounters:
    """Work done by one `sample` call. seconds: wall clock; tokens: committed and valid; head_rows: rows of the LM head."""

    seconds: float = 0.0
    forwards: int = 0
    rows: int = 0
    head_rows: int = 0
    tokens: int = 0
    responses: int = 0
    cache_bytes: int = 0

    def __add__(self, other: EngineCounters) -> EngineCounters:
        """Work of both, the larger cache."""
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return EngineCounters(**summed | {"cache_bytes": max(self.cache_bytes, other.cache_bytes)})


class Engine:
    """Samples responses with one model. Not thread-safe."""

    def __init__(self, model: DiffusionLM):
        self.model = model
        self.spec = model.spec

    @torch.inference_mode()
    def sample(
        self,
        requests: Sequence[Request],
        *,
        decoder: Decoder,
        version: int,
        slots: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Trajectories, EngineCounters]:
        """One trajectory per request, in the order given, at most `slots` of them at a time (0: all at once).

        version: of the weights now loaded. progress(done, total) is called when requests finish. A response depends on neither
        the slots nor its neighbours. Raises RolloutFailed for prompts that cannot be continued.
        """
        self.model.eval()
        start, counters = time.perf_counter(), EngineCounters(responses=len(requests))
        canvas = Canvas(requests, slots or len(requests), decoder, self.spec, self.model.device)
        cache = self._cache(canvas)
        finished: list[dict[str, np.ndarray]] = []
        while len(canvas):
            self._denoise(canvas, cache, counters)
            done = canvas.advance()
            if done.any():
                finished.extend(_harvest(canvas, done))
                kept = canvas.release(done)
                if kept is not None:
                    cache.keep(kept)
                if progress is not None:
                    progress(len(finished), len(requests))
        finished.sort(key=lambda slot: slot["request"])
        trajectories = record(finished, requests, decoder, self.spec, version)
        counters.tokens = int(trajectories.columns["valid_len"].sum())
        counters.seconds = time.perf_counter() - start
        return trajectories, counters

    def _cache(self, canvas: Canvas) -> SlotCache:
        """Full attention keeps nothing between forwards, so one layer's storage serves all of them in turn."""
        config = self.model.lm.config
        return SlotCache(
            slots=len(canvas),
            positions=canvas.ids.shape[1],
            layers=config.num_hidden_layers if self.spec.block_size else 1,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=self.model.lm.dtype,
            device=self.model.device,
        )

    def _denoise(self, canvas: Canvas, cache: SlotCache, counters: EngineCounters) -> None:
        """One denoising step of every active slot."""
        position, masked = canvas.active_positions()
        hidden, first_row = self._forward(canvas, cache, counters)
        slot, column = masked.nonzero(as_tuple=True)
        rows = first_row[slot] + position[slot, column] - canvas.clean[slot] - self.spec.logit_shift
        seed, step = canvas.seed.unsqueeze(1), canvas.step.unsqueeze(1)
        noise = uniform(seed, position, step, TOKEN)
        statistics = row_statistics(self.model.logits(hidden[rows]), noise[slot, column], canvas.decoder.temperature)
        laid_out = RowStatistics(*(_lay_out(values, masked) for values in statistics))
        order_noise = uniform(seed, position, step, POSITION_SCORE)
        score = SCORERS[canvas.decoder.score].score(laid_out, position, order_noise)
        score = canvas.decoder.weigh_eos(score, torch.isin(laid_out.token, canvas.eos), canvas.block_step)
        settled = canvas.settled() if canvas.decoder.selector.uses_settled else None
        view = StepView(score, masked, laid_out, canvas.block_step, settled)
        chosen, forced = canvas.decoder.choose(view)
        trace = {"logp": laid_out.logp, "logp_t1": laid_out.logp_t1, "confidence": laid_out.p_token, "forced": forced}
        canvas.commit(position, chosen, laid_out.token, trace)
        counters.head_rows += len(rows)

    def _forward(self, canvas: Canvas, cache: SlotCache, counters: EngineCounters):
        """Packed rows [clean, needed end) of every slot → (hidden [T, d], first row of each slot int64 [n])."""
        block = self.spec.block_size
        until = canvas.block_end if block else canvas.end
        counts = until - canvas.clean
        slot = torch.repeat_interleave(torch.arange(len(canvas), device=counts.device), counts)
        first_row = counts.cumsum(0) - counts
        position = canvas.clean[slot] + torch.arange(len(slot), device=counts.device) - first_row[slot]
        key_len = (position // block + 1) * block if block else until[slot]
        plan = cache.plan(slot, position, key_len, len(canvas))
        hidden = self.model.hidden(canvas.ids[slot, position].unsqueeze(0), position.unsqueeze(0), plan)[0]
        counters.forwards += 1
        counters.rows += len(slot)
        counters.cache_bytes = max(counters.cache_bytes, cache.nbytes)
        return hidden, first_row


def _lay_out(values: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(masked.shape, dtype=values.dtype, device=values.device)
    out[masked] = values
    return out


def _harvest(canvas: Canvas, done: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Copies of the finished slots, on the host."""
    rows = done.nonzero().squeeze(1)
    columns = {"request": canvas.request, "ids": canvas.ids, "prompt_len": canvas.prompt_len}
    columns |= {"limit": canvas.limit, "end": canvas.end}
    host = {k: v[rows].cpu().numpy() for k, v in (columns | canvas.trace).items()}
    return [{k: v[i] for k, v in host.items()} for i in range(len(rows))]
