"""From finished canvases to trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.request import Request
from rlpipe.trajectory import COMMIT, EventLog, Trajectories, Trajectory


def record(
    finished: Sequence[dict[str, np.ndarray]],
    requests: Sequence[Request],
    decoder: Decoder,
    spec: DiffusionSpec,
    version: int,
) -> Trajectories:
    """finished: one dict a request, in request order: ids and trace columns [W], prompt_len, limit, end."""
    settings = decoder.settings()
    return Trajectories.of(
        _trajectory(slot, request, settings, spec, version) for slot, request in zip(finished, requests, strict=True)
    )


def _trajectory(slot: dict[str, Any], request: Request, settings: dict, spec: DiffusionSpec, version: int) -> Trajectory:
    prompt_len, end = int(slot["prompt_len"]), int(slot["end"])
    response = slot["ids"][prompt_len:end].astype(np.int32)
    step = slot["step"][prompt_len:end]
    if spec.block_size:  # blocks behind the one that ended the response were never opened
        last = prompt_len + int(np.flatnonzero(step)[-1])
        kept = (last // spec.block_size + 1) * spec.block_size - prompt_len
        response, step = response[:kept], step[:kept]
    valid_len, stop = _valid(response, step, int(slot["limit"]) - prompt_len, spec.eos_token_ids)
    first_block = prompt_len // spec.block_size if spec.block_size else 0
    last_block = (prompt_len + len(response) - 1) // spec.block_size if spec.block_size else 0
    return Trajectory(
        uid=request.uid,
        sample=request.sample,
        seed=request.seed,
        prompt_ids=slot["ids"][:prompt_len].astype(np.int32),
        response_ids=response,
        valid_len=valid_len,
        block_size=spec.block_size,
        versions=np.full(last_block - first_block + 1, version, np.int32),
        stop=stop,
        events=_events(slot, step, response, prompt_len),
        decoder=settings,
    )


def _valid(response: np.ndarray, step: np.ndarray, max_tokens: int, eos: Sequence[int]) -> tuple[int, str]:
    """Tokens that count: up to and including the first EOS, at most max_tokens."""
    counted = response[:max_tokens]
    ends = np.flatnonzero(np.isin(counted, np.array(eos, np.int32)) & (step[:max_tokens] > 0))
    return (int(ends[0]) + 1, "eos") if len(ends) else (len(counted), "length")


def _events(slot: dict[str, Any], step: np.ndarray, response: np.ndarray, prompt_len: int) -> EventLog:
    """Commits in order of (step, position); these decoders never touch a committed token."""
    position = np.flatnonzero(step)
    position = position[np.argsort(step[position], kind="stable")]
    column = lambda name: slot[name][prompt_len:][position]  # noqa: E731
    return EventLog(
        step=(step[position] - 1).astype(np.int32),
        position=position.astype(np.int32),
        token=response[position],
        kind=np.full(len(position), COMMIT, np.int8),
        logp=column("logp"),
        logp_t1=column("logp_t1"),
        confidence=column("confidence"),
        forced=column("forced"),
    )
