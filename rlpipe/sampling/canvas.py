"""The state of a batch of requests while they are denoised: one row a slot, compacted as requests finish."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlpipe.errors import RolloutFailed
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.decoder import Decoder

TRACE = {"step": torch.int32, "logp": torch.float32, "logp_t1": torch.float32, "confidence": torch.float32}


class Canvas:
    """n active slots over canvases of W positions (prompt, response, filler behind shorter ones).

    request int64[n]: which request each slot serves · ids int64[n, W] · prompt_len, end (of the canvas), block_start,
    block_end (of the active block), clean (positions below it are final and, with a cache, stored), step (denoising steps
    so far), block_step (those of the active block), seed: int64[n] · trace: [n, W] buffers of what
    happened at commit; step is 1-based, 0 means never.
    """

    def __init__(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], decoder: Decoder, spec: DiffusionSpec, device):
        self.decoder, self.spec = decoder, spec
        lens = np.array([len(p) for p in prompts], np.int64)
        ends = lens + decoder.max_tokens
        if spec.block_size:  # the grid is absolute, so the last block may reach past max_tokens; it is kept whole
            ends = -(-ends // spec.block_size) * spec.block_size
        ids = np.full((len(prompts), int(ends.max())), spec.mask_token_id, np.int64)
        for row, prompt in enumerate(prompts):
            if not len(prompt) or (np.asarray(prompt) == spec.mask_token_id).any():
                raise RolloutFailed(f"prompt {row} of the batch is empty or contains MASK; it cannot be continued")
            ids[row, : len(prompt)] = prompt
        tensor = lambda x: torch.as_tensor(x, device=device)  # noqa: E731
        self.request = torch.arange(len(prompts), device=device)
        self.ids, self.prompt_len, self.end = tensor(ids), tensor(lens), tensor(ends)
        self.seed = tensor(np.array(seeds, np.int64))
        self.step = torch.zeros_like(self.prompt_len)
        self.block_step = torch.zeros_like(self.prompt_len)
        self.clean = torch.zeros_like(self.prompt_len)
        self.block_start = self.prompt_len.clone()
        if spec.block_size:  # prompt tokens in an unfinished block open the first denoised block
            self.block_start -= self.prompt_len % spec.block_size
        self.block_end = self._block_end()
        self.trace = {k: torch.zeros(ids.shape, dtype=dtype, device=device) for k, dtype in TRACE.items()}
        self.trace["forced"] = torch.zeros(ids.shape, dtype=torch.bool, device=device)
        self.eos = tensor(np.array(spec.eos_token_ids, np.int64))

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
        """bool [n]: an EOS counts (within max_tokens) and every position before the first one is committed."""
        column = torch.arange(self.ids.shape[1], device=self.ids.device)
        limit = (self.prompt_len + self.decoder.max_tokens).unsqueeze(1)
        response = (column >= self.prompt_len.unsqueeze(1)) & (column < limit)
        is_eos = torch.isin(self.ids, self.eos) & response
        first = torch.where(is_eos, column, self.ids.shape[1]).amin(1, keepdim=True)
        open_before = (self.ids == self.spec.mask_token_id) & response & (column < first)
        return is_eos.any(1) & ~open_before.any(1)

    def take(self, slots: torch.Tensor) -> None:
        """Keep only the given slots, in that order."""
        for name in ("request", "ids", "prompt_len", "end", "seed", "step", "block_step", "clean", "block_start", "block_end"):
            setattr(self, name, getattr(self, name)[slots])
        self.trace = {k: v[slots] for k, v in self.trace.items()}
