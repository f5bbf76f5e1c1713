"""Requests as columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlpipe.errors import RolloutFailed
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.request import Request

NO_ID = -1


def request_table(requests: Sequence[Request], decoder: Decoder, spec: DiffusionSpec) -> tuple[dict[str, np.ndarray], bool]:
    """(columns of all requests, whether all use the decoder's own temperature, top_p and top_k).

    ids int64 [N, W]: prompt, preset tokens, MASK · preset bool [N, W] · stop_ids int64 [N, K], padded with NO_ID · others [N].
    Raises RolloutFailed for a request that cannot be served.
    """
    lens = np.array([len(request.prompt_ids) for request in requests], np.int64)
    limits = lens + np.array([request.max_tokens or decoder.max_tokens for request in requests], np.int64)
    ends = limits
    if spec.block_size:  # the grid is absolute, so the last block may reach past the limit; it is kept whole
        ends = -(-limits // spec.block_size) * spec.block_size
    ids = np.full((len(requests), int(ends.max())), spec.mask_token_id, np.int64)
    preset = np.zeros(ids.shape, bool)
    for row, request in enumerate(requests):
        _check(request, int(limits[row] - lens[row]), spec)
        ids[row, : lens[row]] = request.prompt_ids
        where = [int(lens[row]) + offset for offset in request.preset]
        ids[row, where] = list(request.preset.values())
        preset[row, where] = True
    names: dict[bytes, int] = {}
    biased = [row for row, request in enumerate(requests) if request.bias]
    bias_row = np.full(len(requests), NO_ID, np.int64)
    bias_row[biased] = np.arange(len(biased))
    sampling = {
        name: np.array([getattr(decoder, name) if getattr(r, name) is None else getattr(r, name) for r in requests], dtype)
        for name, dtype in (("temperature", np.float32), ("top_p", np.float32), ("top_k", np.int64))
    }
    uniform = all(r.temperature is None and r.top_p is None and r.top_k is None for r in requests)
    columns = {
        "ids": ids,
        "preset": preset,
        "prompt": np.array([names.setdefault(r.prompt_ids.tobytes(), len(names)) for r in requests], np.int64),
        "prompt_len": lens,
        "limit": limits,
        "end": ends,
        "seed": np.array([request.seed for request in requests], np.int64),
        "stop_ids": _stop_ids(requests, spec),
        "bias_row": bias_row,
    }
    return columns | sampling, uniform


def bias_matrix(requests: Sequence[Request], vocabulary: int) -> np.ndarray | None:
    """float32 [requests with a bias, V] in order, or None."""
    biased = [request.bias for request in requests if request.bias]
    if not biased:
        return None
    matrix = np.zeros((len(biased), vocabulary), np.float32)
    for row, bias in enumerate(biased):
        matrix[row, list(bias)] = list(bias.values())
    return matrix


def _stop_ids(requests: Sequence[Request], spec: DiffusionSpec) -> np.ndarray:
    width = max(1, max(len(r.stop_ids) for r in requests) + len(spec.eos_token_ids))
    table = np.full((len(requests), width), NO_ID, np.int64)
    for row, request in enumerate(requests):
        wanted = (*spec.eos_token_ids, *request.stop_ids)
        table[row, : len(wanted)] = wanted
    return table


def _check(request: Request, room: int, spec: DiffusionSpec) -> None:
    if not len(request.prompt_ids) or (request.prompt_ids == spec.mask_token_id).any():
        raise RolloutFailed(f"the prompt of {request.uid} is empty or contains MASK; it cannot be continued")
    if room < 1:
        raise RolloutFailed(f"{request.uid} asks for {room} tokens; max_tokens must be at least 1")
    if request.temperature is not None and request.temperature < 0:
        raise RolloutFailed(f"{request.uid} has temperature {request.temperature}; it must be at least 0 (0: greedy)")
    if (request.top_p is not None and not 0 < request.top_p <= 1) or (request.top_k is not None and request.top_k < 0):
        raise RolloutFailed(f"{request.uid}: top_p must be in (0, 1] and top_k at least 0 (0: off)")
    for offset, token in request.preset.items():
        if not 0 <= offset < room or token == spec.mask_token_id:
            raise RolloutFailed(f"{request.uid} fixes token {token} at offset {offset}: 0 to {room - 1}, and never MASK")
