"""Guides for guided decoding that need no server: functions of the tokens before a position, as a causal model is."""

from __future__ import annotations

import numpy as np
import torch

from rlpipe.models.attention import DensePlan


class Guide:
    """next_token(tokens before, as a tuple) says what follows; `calls` keeps the sizes of the questions."""

    def __init__(self, next_token):
        self.next_token, self.calls = next_token, []

    def greedy_next(self, tokens, *, timeout_s):
        assert timeout_s > 0 and all(len(row) for row in tokens)
        self.calls.append([len(row) for row in tokens])
        return [np.array([self.next_token(tuple(row[: i + 1])) for i in range(len(row))], np.int32) for row in tokens]

    def text(self, prompt, length: int) -> list[int]:
        """Its greedy continuation."""
        tokens = [int(token) for token in prompt]
        for _ in range(length):
            tokens.append(int(self.next_token(tuple(tokens))))
        return tokens[len(prompt) :]


def constant(token: int) -> Guide:
    return Guide(lambda before: token)


def random(vocabulary: int, salt: int = 0) -> Guide:
    """Says anything, the same after the same tokens."""
    return Guide(lambda before: int(np.random.default_rng([salt, *before]).integers(vocabulary)))


def reader(model, length: int) -> Guide:
    """The model itself, read from left to right: its most likely token at the first mask behind the given ones. It agrees with
    every greedy draft at the first masked position. length: of the canvas, prompt included; block models see to the end of the
    block."""
    spec, memory = model.spec, {}

    @torch.inference_mode()
    def next_token(before: tuple[int, ...]) -> int:
        if before not in memory:
            size = spec.block_size
            end = (len(before) // size + 1) * size if size else max(length, len(before) + 1)
            ids = torch.full((1, end), spec.mask_token_id)
            ids[0, : len(before)] = torch.tensor(before)
            where = torch.arange(end)
            mask = None if not size else ((where.unsqueeze(1) // size) >= (where // size)).unsqueeze(0)
            hidden = model.hidden(ids, where.unsqueeze(0), DensePlan(mask))[0]
            memory[before] = int(
                model.logits(hidden[len(before) - spec.logit_shift : len(before) - spec.logit_shift + 1]).argmax()
            )
        return memory[before]

    return Guide(next_token)
