"""From finished canvases to trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.canvas import Canvas
from rlpipe.sampling.request import Request
from rlpipe.trajectory import COMMIT, PRESET, REMASK, EventLog, Trajectory

COLUMNS = ("logp", "logp_t1", "confidence", "forced")


class EditLog:
    """Events of decoders that take tokens back, as they happen; a position may have many."""

    def __init__(self) -> None:
        self.parts: list[dict[str, np.ndarray]] = []

    def commits(self, canvas: Canvas, position: torch.Tensor, chosen: torch.Tensor) -> None:
        self._append(canvas, position, chosen, COMMIT)

    def remasks(self, canvas: Canvas, position: torch.Tensor, taken: torch.Tensor, mask_id: int) -> None:
        self._append(canvas, position, taken, REMASK)

    def _append(self, canvas: Canvas, position: torch.Tensor, where: torch.Tensor, kind: int) -> None:
        slot, column = where.nonzero(as_tuple=True)
        at = (slot, position[slot, column])
        part = {"request": canvas.request[slot], "step": canvas.step[slot] - 1, "position": at[1] - canvas.prompt_len[slot]}
        part |= {"token": canvas.ids[at], "kind": torch.full_like(slot, kind)}
        part |= {name: canvas.trace[name][at] for name in COLUMNS}
        self.parts.append({k: v.cpu().numpy() for k, v in part.items()})

    def close(self, slots: list[dict[str, Any]]) -> None:
        """Move the events of finished requests to their slots, under `events`."""
        merged = {k: np.concatenate([part[k] for part in self.parts]) for k in self.parts[0]}
        gone = np.zeros(len(merged["request"]), bool)
        for slot in slots:
            mine = merged["request"] == slot["request"]
            slot["events"] = {k: v[mine] for k, v in merged.items()}
            gone |= mine
        self.parts = [{k: v[~gone] for k, v in merged.items()}]


def record(
    finished: Sequence[dict[str, Any]], requests: Sequence[Request], settings: dict[str, Any], spec: DiffusionSpec
) -> list[Trajectory]:
    """finished: one dict a request, in their order: ids, stop_ids and trace columns, prompt_len, limit, end, block_end, stale,
    `events` where tokens could be taken back and `predictions` where they were asked for. settings: of the decoder."""
    return [_trajectory(slot, request, settings, spec) for slot, request in zip(finished, requests, strict=True)]


def _trajectory(slot: dict[str, Any], request: Request, settings: dict, spec: DiffusionSpec) -> Trajectory:
    prompt_len = int(slot["prompt_len"])
    end = int(slot["block_end" if spec.block_size else "end"])  # later blocks were never opened
    response = slot["ids"][prompt_len:end].astype(np.int32)
    filled = (slot["step"][prompt_len:end] > 0) | slot["preset"][prompt_len:end]
    version = slot["version"][prompt_len:end]
    events = _edited if "events" in slot else _events
    valid_len, stop = _valid(response, filled, int(slot["limit"]) - prompt_len, slot["stop_ids"])
    return Trajectory(
        uid=request.uid,
        sample=request.sample,
        seed=request.seed,
        prompt_ids=slot["ids"][:prompt_len].astype(np.int32),
        response_ids=response,
        valid_len=valid_len,
        block_size=spec.block_size,
        versions=_versions(version, slot["step"][prompt_len : prompt_len + len(response)] > 0, prompt_len, spec.block_size),
        stop=stop,
        events=events(slot, filled, response, prompt_len, end),
        decoder=settings,
        exact=settings["replayable"] and not bool(slot["stale"]) and not _own_law(request),
        predictions=slot.get("predictions"),
    )


def _own_law(request: Request) -> bool:
    """The request's sampling distribution is not the one that the decoder's settings describe."""
    return bool(request.bias) or any(value is not None for value in (request.temperature, request.top_p, request.top_k))


def _versions(version: np.ndarray, sampled: np.ndarray, prompt_len: int, block_size: int) -> np.ndarray:
    """int32 [blocks]: the oldest weights that a sampled token of each block came from."""
    position = prompt_len + np.arange(len(version))
    block = position // block_size - prompt_len // block_size if block_size else np.zeros_like(position)
    versions = np.full(int(block[-1]) + 1, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(versions, block[sampled], version[sampled])
    return np.where(versions == np.iinfo(np.int32).max, version[sampled].min(), versions)


def _valid(response: np.ndarray, filled: np.ndarray, max_tokens: int, eos: np.ndarray) -> tuple[int, str]:
    """Tokens that count: up to and including the first EOS, at most max_tokens."""
    counted = response[:max_tokens]
    ends = np.flatnonzero(np.isin(counted, eos) & filled[:max_tokens])
    return (int(ends[0]) + 1, "eos") if len(ends) else (len(counted), "length")


def _events(slot: dict[str, Any], filled: np.ndarray, response: np.ndarray, prompt_len: int, end: int) -> EventLog:
    """Commits and presets in order of (step, position): each position has one at most."""
    step, preset = slot["step"][prompt_len:end], slot["preset"][prompt_len:end]
    position = np.flatnonzero(filled)
    position = position[np.argsort(step[position], kind="stable")]
    return EventLog(
        step=(step[position] - 1).astype(np.int32),
        position=position.astype(np.int32),
        token=response[position],
        kind=np.where(preset[position], PRESET, COMMIT).astype(np.int8),
        **{name: slot[name][prompt_len:][position] for name in COLUMNS},
    )


def _edited(slot: dict[str, Any], filled: np.ndarray, response: np.ndarray, prompt_len: int, end: int) -> EventLog:
    """Events as they happened: by step, what was committed before what was taken back before what a rule filled in."""
    position = np.flatnonzero(slot["preset"][prompt_len:end])
    ruled = {"step": slot["step"][prompt_len:end][position] - 1, "position": position, "token": response[position]}
    ruled |= {"kind": np.full(len(position), PRESET)} | {name: slot[name][prompt_len:end][position] for name in COLUMNS}
    columns = {name: np.concatenate([slot["events"][name], ruled[name]]) for name in EventLog.DTYPES}
    order = np.argsort(columns["step"], kind="stable")
    return EventLog(**{name: columns[name][order].astype(dtype) for name, dtype in EventLog.DTYPES.items()})
