"""Noisy rows of a response, laid out so that one forward serves them all.

Block models: the clean prompt and response once, then one segment per (row, block) that has something to score; nothing else
of a row is ever looked at. Full-attention models: one sequence a row, since every token sees every other.
Reference layout ([prompt | clean | noisy] once per row): TraceRL, arXiv 2509.06949. Ours shares the clean copy between the
rows and leaves out what no scored token can see; the attention rule is `rlpipe.models.attention.visible`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlpipe.models.attention import DensePlan, visible


@dataclass(frozen=True, slots=True)
class Pack:
    """One sequence of T tokens with M scored ones.

    input_ids, position_ids, block, copy int64[T] (see `attention.visible`) · index int64[M]: where the scored tokens sit in T
    (with a logit shift: the row that predicts them) · targets int64[M] · slot int64[M]: their place among all scored tokens
    of the response, in row-major order of the row plan.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    block: np.ndarray
    copy: np.ndarray
    index: np.ndarray
    targets: np.ndarray
    slot: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)


def pack_rows(
    prompt_ids: np.ndarray,
    response_ids: np.ndarray,
    masked: np.ndarray,
    scored: np.ndarray,
    *,
    block_size: int,
    mask_id: int,
    logit_shift: int = 0,
    targets: np.ndarray | None = None,
) -> list[Pack]:
    """Packs of one response: prompt_ids [P], response_ids [L], masked and scored bool [R, L], targets int [R, L] or None for
    the response itself. One pack for block models (none if nothing is scored), R for full attention."""
    slot = np.cumsum(scored.ravel()).reshape(scored.shape) - 1
    wanted = np.broadcast_to(response_ids, scored.shape) if targets is None else targets
    if not scored.any():
        return []
    if block_size:
        return [_pack_blocks(prompt_ids, response_ids, masked, scored, slot, wanted, block_size, mask_id)]
    return _pack_canvases(prompt_ids, response_ids, masked, scored, slot, wanted, mask_id, logit_shift)


def _pack_blocks(prompt_ids, response_ids, masked, scored, slot, wanted, size: int, mask_id: int) -> Pack:
    prompt_len, rows = len(prompt_ids), len(scored)
    if (prompt_len + len(response_ids)) % size:
        raise ValueError(f"prompt {prompt_len} + response {len(response_ids)} do not end on the grid of block size {size}")
    tail = prompt_len % size  # prompt tokens that open the first denoised block: clean, inside the noisy segment
    first = prompt_len // size
    canvas = np.concatenate([prompt_ids, response_ids]).astype(np.int64)

    def grid(values: np.ndarray, fill) -> np.ndarray:
        padded = np.full((rows, tail + len(response_ids)), fill, values.dtype)
        padded[:, tail:] = values
        return padded.reshape(rows, -1, size)

    in_segment = grid(scored, False)
    row, block = np.nonzero(in_segment.any(-1))
    block_ids = np.repeat(first + block, size)
    clean_len = (first + int(block.max())) * size  # the last noisy block's clean copy is nobody's key
    noisy = canvas[(first + block)[:, None] * size + np.arange(size)]
    noisy = np.where(grid(masked, False)[row, block], mask_id, noisy)
    position = np.arange(clean_len)
    score = in_segment[row, block].ravel()
    return Pack(
        input_ids=np.concatenate([canvas[:clean_len], noisy.ravel()]),
        position_ids=np.concatenate([position, block_ids * size + np.tile(np.arange(size), len(row))]),
        block=np.concatenate([position // size, block_ids]),
        copy=np.concatenate([np.zeros(clean_len, np.int64), np.repeat(np.arange(1, len(row) + 1), size)]),
        index=clean_len + np.flatnonzero(score),
        targets=grid(wanted.astype(np.int64), 0)[row, block].ravel()[score],
        slot=grid(slot, 0)[row, block].ravel()[score],
    )


def _pack_canvases(prompt_ids, response_ids, masked, scored, slot, wanted, mask_id: int, shift: int) -> list[Pack]:
    packs = []
    prompt_len = len(prompt_ids)
    position = np.arange(prompt_len + len(response_ids))
    zeros = np.zeros(len(position), np.int64)
    for row in range(len(scored)):
        if not scored[row].any():
            continue
        response = np.where(masked[row], mask_id, response_ids)
        where = np.flatnonzero(scored[row])
        packs.append(
            Pack(
                input_ids=np.concatenate([prompt_ids, response]).astype(np.int64),
                position_ids=position,
                block=zeros,
                copy=zeros,
                index=prompt_len + where - shift,
                targets=wanted[row][where].astype(np.int64),
                slot=slot[row][where],
            )
        )
    return packs


@dataclass(slots=True)
class PackedBatch:
    """N packs padded to one length T. input_ids, position_ids int64 [N, T] · mask bool [N, T, T] · index int64 [M] into the
    flattened [N·T] · targets, slot int64 [M] (slot as given to `collate`)."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    index: torch.Tensor
    targets: torch.Tensor
    slot: torch.Tensor

    def plan(self) -> DensePlan:
        return DensePlan(self.mask)

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def collate(packs: Sequence[Pack], slots: Sequence[np.ndarray], pad_id: int) -> PackedBatch:
    """Pad to the longest. slots: for each pack the caller's index of each scored token. pad_id: any valid token id."""
    width = max(len(pack) for pack in packs)
    shape = (len(packs), width)
    ids, position = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    block, copy = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    for row, pack in enumerate(packs):
        end = len(pack)
        ids[row, :end], position[row, :end] = pack.input_ids, pack.position_ids
        block[row, :end], copy[row, :end] = pack.block, pack.copy
    index = np.concatenate([row * width + pack.index for row, pack in enumerate(packs)])
    tensor = torch.from_numpy
    return PackedBatch(
        input_ids=tensor(ids),
        position_ids=tensor(position),
        mask=visible(tensor(block), tensor(copy)),
        index=tensor(index),
        targets=tensor(np.concatenate([pack.targets for pack in packs])),
        slot=tensor(np.concatenate(list(slots)).astype(np.int64)),
    )
