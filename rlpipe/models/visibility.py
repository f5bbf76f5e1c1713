"""Who may see whom in a packed sequence: the one rule that every attention path of the learner is derived from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Tags:
    """What the rule needs to know of tokens; four integer arrays or tensors of one shape [T].

    sequence: of those packed together, that see nothing of each other (a prompt's group, or one canvas under full attention) ·
    response: 0 for the prompt that a group shares, then 1, 2 … · block: on the absolute grid · copy: 0 for clean tokens, an id
    of its own for each noisy segment (one block of one noisy row) of a response.
    """

    sequence: Any
    response: Any
    block: Any
    copy: Any

    def map(self, change) -> Tags:
        return Tags(*(change(getattr(self, field.name)) for field in fields(self)))

    def __getitem__(self, index) -> Tags:
        return self.map(lambda values: values[index])


def visible(query: Tags, key: Tags) -> torch.Tensor:
    """Bool, shapes broadcast: True where a query may see a key.

    Clean queries see clean keys of their own and earlier blocks; noisy queries see clean keys of earlier blocks and their own
    segment; both only of the shared prompt and of their own response. Full attention is the case of a single block. Block form
    as in TraceRL (arXiv 2509.06949) and BD3-LM (arXiv 2503.09573), but on the absolute grid, with every noisy row of a response
    behind one clean copy, and every response of a group behind one prompt.
    """
    own = query.response == key.response
    clean_key = key.copy == 0
    from_clean = (query.copy == 0) & clean_key & (key.block <= query.block)
    from_noisy = (query.copy > 0) & ((clean_key & (key.block < query.block)) | (own & (key.copy == query.copy)))
    return (query.sequence == key.sequence) & (own | (key.response == 0)) & (from_clean | from_noisy)


def visibility(tags: Tags) -> torch.Tensor:
    """bool [T, T] of packed tokens: rows are queries."""
    return visible(tags.map(lambda t: t.unsqueeze(-1)), tags.map(lambda t: t.unsqueeze(-2)))
