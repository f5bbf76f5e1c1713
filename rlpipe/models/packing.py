"""Noisy rows of many responses, laid out flat so that one forward serves them all.

Block models: a group's prompt once, then for each of its responses the clean copy once and one segment per (row, block) that
has something to score; nothing else of a row is ever looked at. Full-attention models: one canvas a row, since every token
sees every other. Reference layout ([prompt | clean | noisy] once per row): TraceRL, arXiv 2509.06949.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlpipe.models.packed_attention import Looks, plan_for
from rlpipe.models.visibility import Tags


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one response brings to a pack: T tokens of its own behind `prefix_ids` [P], which others may share.

    ids, position, block, copy int64[T] (see `visibility.Tags`) · clean: so many of them are the clean copy · edges: where the
    noisy segments (block models) or canvases (full attention) start, and the end, int64[S + 1] · index int64[M]: where the
    scored tokens sit in T (with a logit shift: the row that predicts them) · targets int64[M] · slot int64[M]: their place
    among all scored tokens of the response, in row-major order of the row plan.
    """

    prefix_ids: np.ndarray
    ids: np.ndarray
    position: np.ndarray
    block: np.ndarray
    copy: np.ndarray
    clean: int
    edges: np.ndarray
    index: np.ndarray
    targets: np.ndarray
    slot: np.ndarray
    block_size: int

    def __len__(self) -> int:
        return len(self.ids)


def make_piece(
    prompt_ids: np.ndarray,
    response_ids: np.ndarray,
    masked: np.ndarray,
    scored: np.ndarray,
    *,
    block_size: int,
    mask_id: int,
    logit_shift: int = 0,
    targets: np.ndarray | None = None,
) -> Piece | None:
    """The piece of one response: prompt_ids [P], response_ids [L], masked and scored bool [R, L], targets int [R, L] or None
    for the response itself. None if nothing is scored; ValueError if a block response does not end on the grid."""
    if not scored.any():
        return None
    slot = np.cumsum(scored.ravel()).reshape(scored.shape) - 1
    wanted = np.broadcast_to(response_ids, scored.shape) if targets is None else targets
    if block_size:
        return _blocks(prompt_ids, response_ids, masked, scored, slot, wanted, block_size, mask_id)
    return _canvases(prompt_ids, response_ids, masked, scored, slot, wanted, mask_id, logit_shift)


def _blocks(prompt_ids, response_ids, masked, scored, slot, wanted, size: int, mask_id: int) -> Piece:
    prompt_len, rows = len(prompt_ids), len(scored)
    if (prompt_len + len(response_ids)) % size:
        raise ValueError(f"prompt {prompt_len} + response {len(response_ids)} do not end on the grid of block size {size}")
    tail = prompt_len % size  # prompt tokens that open the first denoised block: clean, inside the noisy segment
    first = prompt_len // size
    canvas = np.concatenate([prompt_ids[prompt_len - tail :], response_ids]).astype(np.int64)

    def grid(values: np.ndarray, fill) -> np.ndarray:
        padded = np.full((rows, len(canvas)), fill, values.dtype)
        padded[:, tail:] = values
        return padded.reshape(rows, -1, size)

    in_segment = grid(scored, False)
    row, block = np.nonzero(in_segment.any(-1))
    clean = int(block.max()) * size  # the last noisy block's clean copy is nobody's key
    noisy = np.where(grid(masked, False)[row, block], mask_id, canvas.reshape(-1, size)[block])
    inside = np.concatenate([np.arange(clean), (block[:, None] * size + np.arange(size)).ravel()])
    score = in_segment[row, block].ravel()
    return Piece(
        prefix_ids=prompt_ids[: first * size].astype(np.int64),
        ids=np.concatenate([canvas[:clean], noisy.ravel()]),
        position=first * size + inside,
        block=first + inside // size,
        copy=np.concatenate([np.zeros(clean, np.int64), np.repeat(np.arange(1, len(row) + 1), size)]),
        clean=clean,
        edges=clean + size * np.arange(len(row) + 1),
        index=clean + np.flatnonzero(score),
        targets=grid(wanted.astype(np.int64), 0)[row, block].ravel()[score],
        slot=grid(slot, 0)[row, block].ravel()[score],
        block_size=size,
    )


def _canvases(prompt_ids, response_ids, masked, scored, slot, wanted, mask_id: int, shift: int) -> Piece:
    live = np.flatnonzero(scored.any(1))
    prompt_len, width = len(prompt_ids), len(prompt_ids) + len(response_ids)
    canvas = np.empty((len(live), width), np.int64)
    canvas[:, :prompt_len] = prompt_ids
    canvas[:, prompt_len:] = np.where(masked[live], mask_id, response_ids)
    row, place = np.nonzero(scored[live])
    return Piece(
        prefix_ids=np.zeros(0, np.int64),
        ids=canvas.ravel(),
        position=np.tile(np.arange(width), len(live)),
        block=np.zeros(canvas.size, np.int64),
        copy=np.zeros(canvas.size, np.int64),
        clean=0,
        edges=width * np.arange(len(live) + 1),
        index=row * width + prompt_len + place - shift,
        targets=wanted[live][row, place].astype(np.int64),
        slot=slot[live][row, place],
        block_size=0,
    )


@dataclass(slots=True)
class PackedBatch:
    """T tokens of many pieces. input_ids, position_ids int64 [1, T] · tags int64 [T] each · index int64 [M] into T · targets,
    slot int64 [M] (slot as given to `pack`) · looks: which queries look at which keys."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    tags: Tags
    index: torch.Tensor
    targets: torch.Tensor
    slot: torch.Tensor
    looks: Looks

    def plan(self):
        return plan_for(self.tags, self.looks)

    def to(self, device: torch.device) -> PackedBatch:
        moved = [getattr(self, name).to(device) for name in ("index", "targets", "slot")]
        tags = self.tags.map(lambda t: t.to(device))
        return PackedBatch(self.input_ids.to(device), self.position_ids.to(device), tags, *moved, self.looks)


def pack(pieces: Sequence[Piece], slots: Sequence[np.ndarray], groups: Sequence[Hashable] | None = None) -> PackedBatch:
    """One flat batch. slots: for each piece the caller's index of each of its scored tokens. groups: pieces of one group have
    the same prompt and share its tokens; None: nobody shares."""
    groups = list(range(len(pieces))) if groups is None else list(groups)
    first: dict[Hashable, int] = {}
    for i, group in enumerate(groups):
        first.setdefault(group, i)
    order = sorted(range(len(pieces)), key=lambda i: first[groups[i]])
    layout = _Layout()
    starts = [0] * len(pieces)
    for place, i in enumerate(order):
        if not place or groups[i] != groups[order[place - 1]]:
            layout.open_group(pieces[i])
        starts[i] = layout.add(pieces[i])
    tensor = torch.from_numpy
    column = lambda name: tensor(np.concatenate(layout.columns[name]))  # noqa: E731
    return PackedBatch(
        input_ids=column("ids")[None],
        position_ids=column("position")[None],
        tags=layout.tags(),
        index=tensor(np.concatenate([start + p.index for start, p in zip(starts, pieces, strict=True)])),
        targets=tensor(np.concatenate([piece.targets for piece in pieces])),
        slot=tensor(np.concatenate(list(slots)).astype(np.int64)),
        looks=layout.looks,
    )


class _Layout:
    """Pieces one behind the other."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "position", "block", "copy")}
        self.runs: list[tuple[int, int, int]] = []  # sequence, response and how many tokens have them
        self.looks = Looks()
        self.length = self.sequence = self.response = 0
        self.prefix = (0, 0)

    def open_group(self, piece: Piece) -> None:
        """The shared prompt, whole blocks of it, at the end of the layout."""
        length, start = len(piece.prefix_ids), self.length
        self.sequence += 1
        self.response = 0
        self.prefix = (start, start + length)
        if length:
            place = np.arange(length)
            self._append(piece.prefix_ids, place, place // piece.block_size, np.zeros(length, np.int64))
            self.runs.append((self.sequence, 0, length))
            self.looks.add(self.prefix, (self.prefix,))

    def add(self, piece: Piece) -> int:
        """Where the piece starts."""
        start = self.length
        self.response += 1
        self._append(piece.ids, piece.position, piece.block, piece.copy)
        if piece.block_size:
            self.runs.append((self.sequence, self.response, len(piece)))
            own = (start, start + piece.clean)
            self.looks.add((start, self.length), tuple(span for span in (self.prefix, own) if span[0] < span[1]))
            self.looks.add_segments(start + piece.edges[:-1], piece.block_size)
            return start
        for edge, following in zip(piece.edges[:-1].tolist(), piece.edges[1:].tolist(), strict=True):
            self.sequence += 1
            self.runs.append((self.sequence, self.response, following - edge))
            canvas = (start + edge, start + following)
            self.looks.add(canvas, (canvas,))
        return start

    def _append(self, *columns: np.ndarray) -> None:
        for parts, values in zip(self.columns.values(), columns, strict=True):
            parts.append(values)
        self.length += len(columns[0])

    def tags(self) -> Tags:
        sequence, response, lengths = np.array(self.runs, np.int64).T
        columns = (np.repeat(sequence, lengths), np.repeat(response, lengths))
        return Tags(*columns, np.concatenate(self.columns["block"]), np.concatenate(self.columns["copy"])).map(torch.from_numpy)
