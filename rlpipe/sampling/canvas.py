"""The state of the requests that are being denoised: one row a slot, refilled as requests finish."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.request import Request
from rlpipe.sampling.scoring import ranks
from rlpipe.sampling.table import request_table

TRACE = {
    "step": torch.int32, "logp": torch.float32, "logp_t1": torch.float32, "confidence": torch.float32, "score": torch.float32,
    "forced": torch.bool, "preset": torch.bool, "version": torch.int32,
}  # fmt: skip


class Canvas:
    """Up to `slots` of N requests at a time, over canvases of W positions (prompt, response, filler behind shorter ones).

    Columns are [n], one a slot, n ≤ slots:
    request: which one it serves · prompt: equal for equal prompts · ids int64[n, W] · prompt_len, limit (end of what counts),
    end (of the canvas) · block_start, block_end, previous_start: the active block and the one before · clean: positions below
    are final and, with a block cache, stored · step: denoising steps so far · block_step: those of the active block · time: its
    place in the schedule · opened: masks when it was opened · accepted: commits of the last step · doubt, rest: steps in
    a row that a guide was of no use, and steps that it is left alone now · seed, temperature, top_p, top_k, stop_ids [n, K],
    bias_row: of the request · bool paused, waiting: takes no step now (before a weight update; for a prompt that another slot
    is prefilling) · stale: begun under weights whose keys and values are still used · refresh: all of them are computed again
    in the next step.
    trace: [n, W] buffers of what happened at commit; step is 1-based, 0 means never; preset: put there by rule.
    A finished slot takes the next waiting request in place: nobody waits for anybody.
    """

    PER_REQUEST = (
        "ids", "prompt", "prompt_len", "limit", "end", "seed", "temperature", "top_p", "top_k", "stop_ids", "bias_row",
    )  # fmt: skip
    COUNTERS = (
        "step", "block_step", "time", "clean", "accepted", "block_start", "block_end", "previous_start", "opened", "doubt",
        "rest",
    )  # fmt: skip
    FLAGS = ("paused", "waiting", "stale", "refresh")

    def __init__(self, requests: Sequence[Request], slots: int, decoder: Decoder, spec: DiffusionSpec, device: torch.device):
        self.decoder, self.spec, self.device = decoder, spec, device
        table, self.uniform = request_table(requests, decoder, spec)
        self.table = {name: torch.as_tensor(values, device=device) for name, values in table.items()}
        self.preset = self.table.pop("preset")
        self.total, self.admitted, self.version = len(requests), min(slots, len(requests)), 0
        rows = torch.arange(self.admitted, device=device)
        for name in self.PER_REQUEST:
            setattr(self, name, self.table[name][rows])
        for name in ("request", *self.COUNTERS):
            setattr(self, name, torch.zeros_like(rows))
        for name in self.FLAGS:
            setattr(self, name, torch.zeros_like(rows, dtype=torch.bool))
        self.column = torch.arange(self.ids.shape[1], device=device)
        self.trace = {k: torch.zeros(self.ids.shape, dtype=dtype, device=device) for k, dtype in TRACE.items()}
        self._admit(rows, rows)

    def __len__(self) -> int:
        return len(self.request)

    # --- admission -------------------------------------------------------------------------------------------------------

    def _admit(self, rows: torch.Tensor, requests: torch.Tensor) -> None:
        """Start `requests` in the slots `rows`."""
        self.request[rows] = requests
        for name in self.PER_REQUEST:
            getattr(self, name)[rows] = self.table[name][requests]
        for name in (*self.COUNTERS, *self.FLAGS):
            getattr(self, name)[rows] = 0
        for buffer in self.trace.values():
            buffer[rows] = 0
        self.trace["preset"][rows] = self.preset[requests]
        start = self.prompt_len[rows]
        if self.spec.block_size:  # prompt tokens in an unfinished block open the first denoised block
            start = start - start % self.spec.block_size
        self.block_start[rows] = self.previous_start[rows] = start
        self.block_end[rows] = self._block_end()[rows]
        self.opened[rows] = self._masks()[rows]

    def release(self, done: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Give finished slots (bool [n]) to waiting requests; with none left, drop them.

        Returns (slots that stay, in their new order, or None if all do; slots given away whose new prompt is stored already;
        the slots that store it). The last two refer to the slots before any is dropped.
        """
        free = done.nonzero().squeeze(1)
        fresh = free[: self.total - self.admitted]
        requests = torch.arange(self.admitted, self.admitted + len(fresh), device=self.device)
        donor, found = self._donors(self.table["prompt"][requests])
        if len(fresh):
            self._admit(fresh, requests)
            self.admitted += len(fresh)
            self.clean[fresh[found]] = self.prefix_len()[fresh[found]]
        given, source = fresh[found], donor[found]
        if len(fresh) == len(free):
            return None, given, source
        stays = torch.ones_like(done)
        stays[free[len(fresh) :]] = False
        kept = stays.nonzero().squeeze(1)
        holes = free[len(fresh) :]
        holes = holes[holes < len(kept)]  # filled from the end, so that the others need not move
        survivors = kept[len(kept) - len(holes) :]
        kept = torch.arange(len(kept), device=self.device)
        kept[holes] = survivors
        for name in ("request", *self.PER_REQUEST, *self.COUNTERS, *self.FLAGS):
            setattr(self, name, getattr(self, name)[kept])
        self.trace = {k: v[kept] for k, v in self.trace.items()}
        return kept, given, source

    def prefix_len(self) -> torch.Tensor:
        """int64 [n]: prompt tokens in whole blocks; what samples of one prompt can share. 0 under full attention."""
        size = self.spec.block_size
        return self.prompt_len // size * size if size else torch.zeros_like(self.prompt_len)

    def _donors(self, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For prompts int64 [k]: (a slot that stores each one's prefix under the current weights, whether there is one)."""
        prefix = self.prefix_len()
        stored = (self.clean >= prefix) & (prefix > 0) & ~self.waiting & ~self.stale
        same = (prompts.unsqueeze(1) == self.prompt) & stored
        return same.int().argmax(1), same.any(1)

    def wait_for_prompts(self) -> bool:
        """Slots whose prompt an earlier slot is about to prefill wait for it; True if any does."""
        untouched = (self.clean == 0) & (self.prefix_len() > 0)
        same = (self.prompt.unsqueeze(1) == self.prompt) & untouched
        self.waiting = untouched & same.tril(-1).any(1)
        return bool(self.waiting.any())

    def served(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(waiting slots whose prompt is now stored, where); they stop waiting."""
        slots = self.waiting.nonzero().squeeze(1)
        donor, found = self._donors(self.prompt[slots])
        slots, donor = slots[found], donor[found]
        self.waiting[slots] = False
        self.clean[slots] = self.prefix_len()[slots]
        return slots, donor

    # --- looking ---------------------------------------------------------------------------------------------------------

    def _block_end(self) -> torch.Tensor:
        size = self.decoder.block_size
        return torch.minimum(self.block_start + size, self.end) if size else self.end.clone()

    def within(self, start: torch.Tensor | int, end: torch.Tensor) -> torch.Tensor:
        """bool [n, W]: positions in [start, end)."""
        start = start.unsqueeze(1) if isinstance(start, torch.Tensor) else start
        return (self.column >= start) & (self.column < end.unsqueeze(1))

    def _masks(self) -> torch.Tensor:
        """int64 [n]: masks of the active block."""
        return ((self.ids == self.spec.mask_token_id) & self.within(self.block_start, self.block_end)).sum(1)

    @property
    def opening(self) -> torch.Tensor:
        """bool [n]: the active block has not been forwarded yet."""
        return self.block_step == 0

    def window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(position int64 [n, B], inside bool [n, B]) of what this step may change: the active block, or with an editor that
        opens earlier blocks again the response up to its end. Positions past the window are clamped."""
        editor = self.decoder.editor
        start = self.prompt_len if editor is not None and editor.scope == "sequence" else self.block_start
        width = int((self.block_end - start).max())
        position = start.unsqueeze(1) + torch.arange(width, device=self.device)
        inside = position < self.block_end.unsqueeze(1)
        return torch.minimum(position, self.block_end.unsqueeze(1) - 1), inside

    def masked_at(self, position: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        return inside & (self.ids.gather(1, position) == self.spec.mask_token_id)

    def masked_outside(self, position: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """bool [n, W]: masked positions of the response besides those `masked` [n, B] at `position`."""
        here = torch.zeros_like(self.ids, dtype=torch.bool).scatter_add(1, position, masked)
        return (self.ids == self.spec.mask_token_id) & self.within(self.prompt_len, self.end) & ~here

    def everywhere(self) -> torch.Tensor:
        """int64 [n, W]: the positions of the canvas."""
        return self.column.expand(self.ids.shape)

    def is_prompt(self) -> torch.Tensor:
        return self.column < self.prompt_len.unsqueeze(1)

    def just_decoded(self) -> torch.Tensor:
        """bool [n, W]: committed by the last step."""
        step = self.step.unsqueeze(1)
        return (self.trace["step"] == step) & (step > 0)

    def settled_before(self) -> torch.Tensor:
        """bool [n, W]: committed before the last step, so that a forward has seen it as a token."""
        return (self.trace["step"] > 0) & (self.trace["step"] < self.step.unsqueeze(1)) | self.trace["preset"]

    def next_in_order(self, order_noise: torch.Tensor) -> torch.Tensor:
        """bool [n, W]: masked positions that a random order commits next."""
        position, inside = self.window()
        masked = self.masked_at(position, inside)
        quota = self.decoder.schedule.commits(self.opened, masked.sum(1), self.time).clamp_min(1)
        chosen = masked & (ranks(order_noise.float(), masked) < quota.unsqueeze(1))
        return torch.zeros_like(self.ids, dtype=torch.bool).scatter_add(1, position, chosen)

    def mean_confidence(self) -> torch.Tensor:
        """float32 [n]: of what the active block has committed so far, NaN where nothing."""
        start = torch.maximum(self.block_start, self.prompt_len)
        done = self.within(start, self.block_end) & (self.trace["step"] > 0) & ~self.trace["preset"]
        return (self.trace["confidence"] * done).sum(-1) / done.sum(-1)

    # --- changing --------------------------------------------------------------------------------------------------------

    def commit(self, position: torch.Tensor, chosen: torch.Tensor, token: torch.Tensor, trace: dict) -> None:
        """Write tokens [n, B] and their trace at `position` where `chosen`, as a part of the step just counted."""
        slot, column = chosen.nonzero(as_tuple=True)
        where = (slot, position[slot, column])
        self.ids[where] = token[slot, column]
        self.trace["step"][where] = self.step[slot].int()
        self.trace["version"][where] = self.version
        for name, values in trace.items():
            self.trace[name][where] = values[slot, column]

    def count_step(self, ready: torch.Tensor, clean: torch.Tensor, time: torch.Tensor, accepted: torch.Tensor) -> None:
        """One denoising step of the slots `ready`, at schedule time `time`, that committed `accepted` positions."""
        self.step += ready
        self.block_step += ready
        self.time = torch.where(ready, time + 1, self.time)
        self.accepted = torch.where(ready, accepted, self.accepted)
        self.clean = clean
        self.refresh &= ~ready

    def remask(self, position: torch.Tensor, taken: torch.Tensor) -> None:
        slot, column = taken.nonzero(as_tuple=True)
        where = (slot, position[slot, column])
        self.ids[where] = self.spec.mask_token_id
        self.trace["step"][where] = 0

    def fill_behind_eos(self) -> None:
        """EoTP: everything masked behind a committed EOS becomes that EOS at once, by rule and not by draw."""
        first = self._first_eos()
        until = self.block_end if self.spec.block_size else self.end
        behind = (self.ids == self.spec.mask_token_id) & self.within(first, until)
        eos = self.ids.gather(1, first.clamp_max(self.ids.shape[1] - 1).unsqueeze(1))
        self.ids = torch.where(behind, eos, self.ids)
        self.trace["step"] = torch.where(behind, self.step.unsqueeze(1).int(), self.trace["step"])
        self.trace["preset"] |= behind

    def advance(self) -> torch.Tensor:
        """Open the next block where the active one is full; returns bool [n]: requests that are done."""
        position, inside = self.window()
        full = ~self.masked_at(position, inside).any(-1) & (self.block_step > 0)
        stop = self.decoder.stop
        done = full & (self.block_end >= self.end)
        if stop != "length":
            done = done | (self._ended() & (full if stop == "block" else True))
        done = done & (self.step > 0)
        turn = full & ~done
        for name in ("block_step", "time", "accepted"):
            setattr(self, name, torch.where(turn, 0, getattr(self, name)))
        self.previous_start = torch.where(turn, self.block_start, self.previous_start)
        self.block_start = torch.where(turn, self.block_end, self.block_start)
        self.block_end = torch.where(turn, self._block_end(), self.block_end)
        self.opened = torch.where(turn, self._masks(), self.opened)
        return done

    def _first_eos(self) -> torch.Tensor:
        """int64 [n]: position of the first EOS that counts (in the response, within the limit); W if there is none."""
        is_eos = (self.ids.unsqueeze(-1) == self.stop_ids.unsqueeze(1)).any(-1) & self.within(self.prompt_len, self.limit)
        return torch.where(is_eos, self.column, self.ids.shape[1]).amin(1)

    def _ended(self) -> torch.Tensor:
        """bool [n]: an EOS counts and every position before it is committed."""
        first = self._first_eos()
        open_before = (self.ids == self.spec.mask_token_id) & self.within(self.prompt_len, first)
        return (first < self.ids.shape[1]) & ~open_before.any(1)
