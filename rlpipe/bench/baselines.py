"""Rollout as published, to measure the engine against: stock transformers attention, LM head on every row that is forwarded.

Two ways of feeding it: one request at a time, and all in lockstep, padded to the longest. Tokens are the engine's: scores,
selectors, schedules and noise are the same objects, so for an exact cache the two must agree.

Where the published code does more than it needs, we give it the benefit: no head in prefill and commit forwards, statistics in
float32 (LLaDA: float64), and a request that is done ends (LLaDA goes on to the end of the canvas).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rlpipe.errors import ConfigError
from rlpipe.models.policy import DiffusionLM
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.noise import POSITION_SCORE, TOKEN, uniform
from rlpipe.sampling.request import Request
from rlpipe.sampling.scoring import SCORERS, StepView
from rlpipe.sampling.selection import SELECTORS
from rlpipe.sampling.statistics import RowStatistics, row_statistics


@dataclass(slots=True)
class Work:
    """forwards · rows: through the body, padding included · head_rows: through the LM head."""

    forwards: int = 0
    rows: int = 0
    head_rows: int = 0


def check_covered(decoder: Decoder) -> None:
    """Raises ConfigError for decoders that the baselines do not implement."""
    beyond = {
        "edit": decoder.editor is not None,
        "fuse": decoder.fuse is not None,
        "order_temperature": decoder.order_temperature > 0,
        "eos_gamma": decoder.eos_gamma < 1,
        "select": bool(decoder.selector.uses),
        "stop": decoder.stop == "eotp",
    }
    named = [f"decoder.{name}" for name, is_beyond in beyond.items() if is_beyond]
    if named:
        raise ConfigError(f"the baselines do not cover this {', '.join(named)}; measure it alone with baselines=none")


def run(model: DiffusionLM, requests: Sequence[Request], decoder: Decoder, batch: int) -> tuple[list[np.ndarray], Work]:
    """Valid tokens of each request (int64 [valid]), in order; `batch` requests advance in lockstep (1: the sequential way)."""
    work, found = Work(), []
    with stock_attention(model.lm), torch.inference_mode():
        for start in range(0, len(requests), batch):
            lanes = Lanes(model, requests[start : start + batch], decoder)
            (_blocks if model.spec.block_size else _canvases)(model, lanes, work)
            found += lanes.responses()
    return found, work


@contextmanager
def stock_attention(lm: nn.Module) -> Iterator[None]:
    """The model's own attention, bidirectional: what visibility there is comes as a mask. Restored afterwards."""
    config = lm.config  # the layers hold the same object and look the implementation up at every call
    before = {name: getattr(config, name, None) for name in ("_attn_implementation", "is_causal")}
    config._attn_implementation, config.is_causal = "sdpa", False
    try:
        yield
    finally:
        config._attn_implementation = before["_attn_implementation"]
        if before["is_causal"] is None:
            del config.is_causal
        else:
            config.is_causal = before["is_causal"]


class Lanes:
    """n requests side by side. ids int64 [n, W], all [n]: pad (columns before a request's position 0), prompt_len, limit, end
    (own positions), step (denoising steps so far), time (those of the block), opened (masks when the block was opened),
    ended bool. Block models are padded on the left by whole blocks, so that all start denoising at the column `first` and each
    keeps its own positions and block grid; full attention is padded on the right. real bool [n, W]: no padding.
    """

    def __init__(self, model: DiffusionLM, requests: Sequence[Request], decoder: Decoder):
        self.spec, self.decoder, size, device = model.spec, decoder, model.spec.block_size, model.device
        lens = np.array([len(r.prompt_ids) for r in requests], np.int64)
        limit = lens + np.array([r.max_tokens or decoder.max_tokens for r in requests], np.int64)
        end = -(-limit // size) * size if size else limit
        opens = lens // size * size if size else lens
        pad = opens.max() - opens if size else np.zeros_like(lens)
        ids = np.full((len(lens), int((end + pad).max())), self.spec.mask_token_id, np.int64)
        for row, request in enumerate(requests):
            ids[row, pad[row] : pad[row] + lens[row]] = request.prompt_ids
        place = lambda values: torch.as_tensor(values, device=device)  # noqa: E731
        self.ids, self.pad, self.prompt_len, self.limit, self.end = map(place, (ids, pad, lens, limit, end))
        self.seed = place(np.array([r.seed for r in requests], np.int64))
        self.first, self.width, self.ragged = int(opens.max()), ids.shape[1], bool(np.ptp(pad if size else end))
        self.position = torch.arange(self.width, device=device) - self.pad.unsqueeze(1)
        self.real = (self.position >= 0) & (self.position < self.end.unsqueeze(1))
        self.counts = (self.position >= self.prompt_len.unsqueeze(1)) & (self.position < self.limit.unsqueeze(1))
        self.stop_ids = place(np.array(self.spec.eos_token_ids, np.int64))
        self.step, self.time, self.opened = (torch.zeros_like(self.seed) for _ in range(3))
        self.ended = torch.zeros_like(self.seed, dtype=torch.bool)

    def masked(self, column: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """bool [n, B]: still to be denoised, of the columns int64 [n, B]."""
        return inside & (self.ids.gather(1, column) == self.spec.mask_token_id) & ~self.ended.unsqueeze(1)

    def open(self, column: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        masked = self.masked(column, inside)
        self.opened, self.time = masked.sum(1), torch.zeros_like(self.time)
        return masked

    def statistics(self, logits: torch.Tensor, column: torch.Tensor) -> RowStatistics:
        """Of all rows [n · B, V], laid out as [n, B] like `column`."""
        decoder, noise = self.decoder, torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        if decoder.temperature > 0:
            noise = self._noise(column, TOKEN).flatten()
        found = row_statistics(
            logits, noise, decoder.temperature,
            top_p=decoder.top_p, top_k=decoder.top_k, needs=decoder.needs, confidence=decoder.confidence,
        )  # fmt: skip
        return RowStatistics(*(values.view(column.shape) for values in found))

    def commit(self, found: RowStatistics, column: torch.Tensor, inside: torch.Tensor, masked: torch.Tensor) -> None:
        """One denoising step of the lanes that have masks; everything is [n, B]."""
        decoder = self.decoder
        time = decoder.schedule.useful(masked.sum(1), self.time) if decoder.selector.skips_idle_steps else self.time
        drawn = decoder.score == "random" or isinstance(decoder.selector, SELECTORS["bernoulli"])
        noise = self._noise(column, POSITION_SCORE) if drawn else torch.zeros_like(masked, dtype=torch.float64)
        view = StepView(
            score=SCORERS[decoder.score].score(found, self.position.gather(1, column), noise),
            masked=masked,
            statistics=found,
            noise=noise,
            quota=decoder.schedule.commits(self.opened, masked.sum(1), time),
            time=time,
            opened=self.opened,
            length=inside.sum(1),
            schedule=decoder.schedule,
        )
        chosen, _ = decoder.choose(view)
        lane, place = chosen.nonzero(as_tuple=True)
        self.ids[lane, column[lane, place]] = found.token[lane, place]
        self.step += masked.any(1)
        self.time = time + 1

    def _noise(self, column: torch.Tensor, stream: int) -> torch.Tensor:
        return uniform(self.seed.unsqueeze(1), self.position.gather(1, column), self.step.unsqueeze(1), stream)

    def end_at_eos(self) -> None:
        """Lanes whose first EOS that counts has nothing masked before it are done."""
        is_eos = torch.isin(self.ids, self.stop_ids) & self.counts
        open_before = (self.ids == self.spec.mask_token_id) & self.counts & (is_eos.cumsum(1) == 0)
        self.ended |= is_eos.any(1) & ~open_before.any(1)

    def responses(self) -> list[np.ndarray]:
        ids, pad, lens, limit = (t.cpu().numpy() for t in (self.ids, self.pad, self.prompt_len, self.limit))
        found = []
        for row in range(len(ids)):
            counted = ids[row, pad[row] + lens[row] : pad[row] + limit[row]]
            ends = np.flatnonzero(np.isin(counted, self.spec.eos_token_ids))
            found.append(counted[: int(ends[0]) + 1] if len(ends) else counted)
        return found


def _blocks(model: DiffusionLM, lanes: Lanes, work: Work) -> None:
    """Block diffusion as in SDAR's generate.py: prefill, then for every block denoising forwards over a stock cache, whose keys
    and values are thrown away, and one forward of the full block (the last one too) that keeps them."""
    from transformers import DynamicCache

    size, n, cache = model.spec.block_size, len(lanes.seed), DynamicCache()

    def forward(start: int, until: int, mask: torch.Tensor | None) -> torch.Tensor:
        work.forwards += 1
        work.rows += n * (until - start)
        ids, position = lanes.ids[:, start:until], lanes.position[:, start:until].clamp_min(0)
        return model.lm.model(
            input_ids=ids, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True, is_causal=False
        ).last_hidden_state

    if lanes.first:
        forward(0, lanes.first, _prefill_mask(lanes, size))
    for start in range(lanes.first, lanes.width, size):
        until = start + size
        mask = lanes.real[:, None, None, :until].expand(n, 1, size, until) if lanes.ragged else None
        if mask is not None:  # the block of a lane that is past its end sees itself: no softmax over nothing
            mask = mask | (torch.arange(until, device=mask.device) >= start)
        column = torch.arange(start, until, device=model.device).expand(n, size)
        inside = lanes.real[:, start:until]
        masked = lanes.open(column, inside)
        while bool(masked.any()):
            hidden = forward(start, until, mask)
            cache.crop(-size)
            work.head_rows += n * size
            lanes.commit(lanes.statistics(model.logits(hidden.flatten(0, 1)), column), column, inside, masked)
            masked = lanes.masked(column, inside)
        forward(start, until, mask)
        if lanes.decoder.stop != "length":
            lanes.end_at_eos()
            if bool(lanes.ended.all()):
                break


def _prefill_mask(lanes: Lanes, size: int) -> torch.Tensor:
    """bool [n, 1, first, first]: own and earlier blocks, no padding; padding sees itself."""
    block = torch.arange(lanes.first, device=lanes.ids.device) // size
    mask = (block.unsqueeze(1) >= block) & lanes.real[:, None, None, : lanes.first]
    return mask | (block.unsqueeze(1) == block)


def _canvases(model: DiffusionLM, lanes: Lanes, work: Work) -> None:
    """Full attention as in LLaDA's generate.py: every step forwards the whole canvas and gives all of it to the LM head."""
    n, width, shift = len(lanes.seed), lanes.width, model.spec.logit_shift
    size = lanes.decoder.block_size or int((lanes.end - lanes.prompt_len).max())
    whole = torch.arange(width, device=model.device).expand(n, width)
    mask = lanes.real[:, None, None, :].expand(n, 1, width, width) if lanes.ragged else None
    longest = int((lanes.end - lanes.prompt_len).max())
    for start in range(0, longest, size):
        raw = lanes.prompt_len.unsqueeze(1) + start + torch.arange(min(size, longest - start), device=model.device)
        inside = raw < lanes.end.unsqueeze(1)
        column = torch.minimum(raw, lanes.end.unsqueeze(1) - 1)
        masked = lanes.open(column, inside)
        while bool(masked.any()):
            hidden = model.lm.model(
                input_ids=lanes.ids, position_ids=lanes.position, attention_mask=mask, use_cache=False, is_causal=False
            ).last_hidden_state
            work.forwards += 1
            work.rows += n * width
            work.head_rows += n * width
            if shift:  # the row before a position predicts it
                hidden = hidden.roll(1, dims=1)
            found = lanes.statistics(model.logits(hidden.flatten(0, 1)), whole)
            lanes.commit(RowStatistics(*(v.gather(1, column) for v in found)), column, inside, masked)
            if lanes.decoder.stop != "length":
                lanes.end_at_eos()
            masked = lanes.masked(column, inside)
