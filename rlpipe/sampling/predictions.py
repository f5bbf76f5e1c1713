"""Full predictions: at a denoising step, what each masked position of the response would become if all were committed now."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlpipe.errors import ConfigError
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.canvas import Canvas
from rlpipe.sampling.decoder import Decoder
from rlpipe.sampling.statistics import RowStatistics
from rlpipe.trajectory import Predictions

HELD_STEPS = 32  # on the device, before they are copied to the host together


def check_predictions(decoder: Decoder, spec: DiffusionSpec) -> None:
    """Raises ConfigError if there are no full predictions to record: a position that a step does not forward has none."""
    if spec.block_size:
        raise ConfigError(
            f"step credit needs full attention, and this model attends in blocks of {spec.block_size}: while one is denoised "
            "the later ones do not exist, so there is no full prediction to score. Use another objective or a full-attention "
            "model"
        )
    if decoder.cache.keeps:
        raise ConfigError(
            "step credit reads every masked position at every step, and decoder.cache forwards only a part of them: set "
            "rollout.decoder.cache=none"
        )


class PredictionLog:
    """Collects what the steps drew, request by request; every: steps between two that are kept, besides the first and the last.

    Nothing is copied to the host until a request finishes or HELD_STEPS steps have gathered, and a request keeps
    8 · L bytes a kept step (int32 token, float32 confidence).
    """

    def __init__(self, every: int):
        self.every = every
        self.pending: list[tuple[torch.Tensor, ...]] = []
        self.kept: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}

    def add(
        self,
        canvas: Canvas,
        ready: torch.Tensor,
        window: tuple[torch.Tensor, torch.Tensor, RowStatistics],
        beyond: tuple[torch.Tensor, RowStatistics] | None,
    ) -> None:
        """One step of the slots `ready` bool [n], before its commits. window: (position int64 [n, B], masked bool [n, B], what
        was drawn there) · beyond: (masked bool [n, W] outside the window, what was drawn there, [n, W]), if there is any."""
        position, masked, drawn = window
        here = torch.zeros_like(canvas.ids, dtype=torch.bool).scatter_add(1, position, masked)
        # clamped positions repeat; they are not masked, so they add nothing
        token = torch.zeros_like(canvas.ids).scatter_add(1, position, torch.where(masked, drawn.token, 0))
        confidence = torch.zeros(canvas.ids.shape, device=canvas.device)
        confidence = confidence.scatter_add(1, position, torch.where(masked, drawn.p_token, 0.0))
        tokens = torch.where(here, token, canvas.ids)
        if beyond is not None:
            there, drawn = beyond
            tokens = torch.where(there, drawn.token, tokens)
            confidence = torch.where(there, drawn.p_token, confidence)
        request = torch.where(ready, canvas.request, -1)
        self.pending.append((request, canvas.step.clone(), tokens.int(), confidence))
        if len(self.pending) >= HELD_STEPS:
            self._to_host()

    def close(self, slots: list[dict[str, Any]]) -> None:
        """Move the predictions of finished requests to their slots, under `predictions`."""
        self._to_host()
        for slot in slots:
            step, tokens, confidence = zip(*self.kept.pop(int(slot["request"])), strict=True)
            response = slice(int(slot["prompt_len"]), int(slot["end"]))
            slot["predictions"] = Predictions(
                step=np.array(step, np.int32),
                tokens=np.stack([row[response] for row in tokens]),
                confidence=np.stack([row[response] for row in confidence]),
            )

    def _to_host(self) -> None:
        if not self.pending:
            return
        request, step, tokens, confidence = (torch.cat(column).cpu().numpy() for column in zip(*self.pending, strict=True))
        self.pending = []
        for row in np.flatnonzero(request >= 0):  # in order of time
            mine = self.kept.setdefault(int(request[row]), [])
            if mine and mine[-1][0] % self.every:  # was kept as the last one so far
                mine.pop()
            mine.append((int(step[row]), tokens[row].copy(), confidence[row].copy()))
