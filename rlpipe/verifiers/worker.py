"""The actor around the verifiers. Imports no torch: a verifier process stays near 100 MB and starts at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rlpipe.config import VerifierConfig
from rlpipe.trajectory import Prompt
from rlpipe.usage import usage
from rlpipe.verifiers.scorer import Scorer


class VerifierWorker:
    """Waits for: nothing. Consumes: (prompt, response) pairs. Produces: one dict of floats each, with `reward`."""

    def __init__(self, cfg: VerifierConfig, default_name: str):
        self.scorer = Scorer(cfg, default_name)
        self.scorer.prepare()

    def pid(self) -> int:
        return os.getpid()

    def usage(self) -> dict[str, Any]:
        return usage()

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Raises what a verifier raises; nothing here turns a failure into a number."""
        return self.scorer.score_many(items)
