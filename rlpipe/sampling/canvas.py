"""The state of a batch of requests while they are denoised: one row a slot, refilled as requests finish."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlpipe.errors import RolloutFailed
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.request import Request

TRACE = {
    "step": torch.int32, "logp": torch.float32, "logp_t1": torch.float32, "confidence": torch.float32, "forced": torch.bool,
}  # fmt: skip


class Canvas:
    """Up to `slots` of N requests at a time, over canvases of W positions (prompt, response, filler behind shorter ones).

    request int64[n]: which request each slot serves · ids int64[n, W] · prompt_len, limit (end of what counts), end (of the
    canvas), block_start, block_end (of the active block), clean (positions below it are final and, with a cache, stored), step
    (denoising steps so far), block_step (those of the active block), seed: int64[n] · trace: [n, W] buffers of what happened at
    commit; step is 1-based, 0 means never. A finished slot takes the next waiting request in place: nobody waits for anybody.
    """

    PER_REQUEST = ("ids", "prompt_len", "limit", "end", "seed")
    COUNTERS = ("step", "block_step", "clean")

    def __init__(self, requests: Sequence[Request], slots: int, decoder: Decoder, spec: DiffusionSpec, device: torch.device):
        self.decoder, self.spec = decoder, spec
        self.eos = torch.tensor(spec.eos_token_ids, dtype=torch.int64, device=device)
        self.table = {k: torch.as_tensor(v, device=device) for k, v in _table(requests, decoder, spec).items()}
        self.total, self.admitted = len(requests), min(slots, len(requests))
        rows = torch.arange(self.admitted, device=device)
        for name in self.PER_REQUEST:
            setattr(self, name, self.table[name][rows])
        for name in (*self.COUNTERS, "block_start", "block_end"):
            setattr(self, name, torch.zeros_like(rows))
        self.request = torch.zeros_like(rows)
        self.trace = {k: torch.zeros(self.ids.shape, dtype=dtype, device=device) for k, dtype in TRACE.items()}
        self._admit(rows, rows)

    def _admit(self, rows: torch.Tensor, requests: torch.Tensor) -> None:
        """Start `requests` in the slots `rows`."""
        self.request[rows] = requests
        for name in self.PER_REQUEST:
            getattr(self, name)[rows] = self.table[name][requests]
        for name in self.COUNTERS:
            getattr(self, name)[rows] = 0
        for buffer in self.trace.values():
            buffer[rows] = 0
        start = self.prompt_len[rows]
        if self.spec.block_size:  # prompt tokens in an unfinished block open the first denoised block
            start = start - start % self.spec.block_size
        self.block_start[rows] = start
        self.block_end[rows] = self._block_end()[rows]

    def release(self, done: torch.Tensor) -> torch.Tensor | None:
        """Give finished slots (bool [n]) to waiting requests; with none left, drop them. Returns the slots that stay, in order,
        if any was dropped."""
        free = done.nonzero().squeeze(1)
        fresh = min(len(free), self.total - self.admitted)
        if fresh:
            waiting = torch.arange(self.admitted, self.admitted + fresh, device=free.device)
            self._admit(free[:fresh], waiting)
            self.admitted += fresh
        if fresh == len(free):
            return None
        stays = torch.ones_like(done)
        stays[free[fresh:]] = False
        kept = stays.nonzero().squeeze(1)
        for name in ("request", *self.PER_REQUEST, *self.COUNTERS, "block_start", "block_end"):
            setattr(self, name, getattr(self, name)[kept])
        self.trace = {k: v[kept] for k, v in self.trace.items()}
        return kept

    def __len__(self) -> int:
        return len(self.request)

    def _block_end(self) -> torch.Tensor:
        size = self.decoder.block_size
        return torch.minimum(self.block_start + size, self.end) if size else self.end.clone()

    def active_positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(position int64 [n, B], masked bool [n, B]) of the active blocks; positions past a block are clamped, unmasked."""
        width = int((self.block_end - self.block_start).max())
        position = self.block_start.unsqueeze(1) + torch.arange(width, device=self.ids.device)
        inside = position < self.block_end.unsqueeze(1)
        position = torch.minimum(position, self.block_end.unsqueeze(1) - 1)
        return position, inside & (self.ids.gather(1, position) == self.spec.mask_token_id)

    def settled(self) -> torch.Tensor:
        """float32 [n]: mean confidence of what the active block has committed so far, NaN where nothing."""
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        start = torch.maximum(self.block_start, self.prompt_len)
        inside = (column >= start.unsqueeze(1)) & (column < self.block_end.unsqueeze(1))
        done = inside & (self.trace["step"] > 0)
        return (self.trace["confidence"] * done).sum(-1) / done.sum(-1)

    def commit(self, position: torch.Tensor, chosen: torch.Tensor, token: torch.Tensor, trace: dict) -> None:
        """Write tokens [n, B] and their trace at `position` where `chosen`; counts one denoising step."""
        self.step += 1
        self.block_step += 1
        if self.spec.block_size:  # everything before the active block was just forwarded with its final tokens
            self.clean = self.block_start.clone()
        slot, column = chosen.nonzero(as_tuple=True)
        where = (slot, position[slot, column])
        self.ids[where] = token[slot, column]
        self.trace["step"][where] = self.step[slot].int()
        for name, values in trace.items():
            self.trace[name][where] = values[slot, column]

    def advance(self) -> torch.Tensor:
        """Open the next block where the active one is full; returns bool [n]: requests that are done."""
        position, masked = self.active_positions()
        full = ~masked.any(-1)
        ended = self._has_eos() if len(self.eos) else torch.zeros_like(full)
        done = (full & (self.block_end >= self.end)) | (ended & (full if self.decoder.stop == "block" else True))
        turn = full & ~done
        self.block_step = torch.where(turn, 0, self.block_step)
        self.block_start = torch.where(turn, self.block_end, self.block_start)
        self.block_end = torch.where(turn, self._block_end(), self.block_end)
        return done

    def _has_eos(self) -> torch.Tensor:
        """bool [n]: an EOS counts (within the limit) and every position before the first one is committed."""
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        limit = self.limit.unsqueeze(1)
        response = (column >= self.prompt_len.unsqueeze(1)) & (column < limit)
        is_eos = torch.isin(self.ids, self.eos) & response
        first = torch.where(is_eos, column, self.ids.shape[1]).amin(1, keepdim=True)
        open_before = (self.ids == self.spec.mask_token_id) & response & (column < first)
        return is_eos.any(1) & ~open_before.any(1)


def _table(requests: Sequence[Request], decoder: Decoder, spec: DiffusionSpec) -> dict[str, np.ndarray]:
    """Columns of all requests: ids int64 [N, W], the rest int64 [N]. Raises RolloutFailed for a prompt that cannot be used."""
    lens = np.array([len(request.prompt_ids) for request in requests], np.int64)
    limits = lens + np.array([request.max_tokens or decoder.max_tokens for request in requests], np.int64)
    ends = limits
    if spec.block_size:  # the grid is absolute, so the last block may reach past the limit; it is kept whole
        ends = -(-limits // spec.block_size) * spec.block_size
    ids = np.full((len(requests), int(ends.max())), spec.mask_token_id, np.int64)
    for row, request in enumerate(requests):
        if not len(request.prompt_ids) or (request.prompt_ids == spec.mask_token_id).any():
            raise RolloutFailed(f"the prompt of {request.uid} is empty or contains MASK; it cannot be continued")
        ids[row, : lens[row]] = request.prompt_ids
    seeds = np.array([request.seed for request in requests], np.int64)
    return {"ids": ids, "prompt_len": lens, "limit": limits, "end": ends, "seed": seeds}
