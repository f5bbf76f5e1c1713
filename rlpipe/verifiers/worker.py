"""The actor around a verifier. Imports no torch: a verifier process stays near 100 MB and starts at once."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rlpipe.trajectory import Prompt
from rlpipe.verifiers.registry import load_verifier, score


class VerifierWorker:
    """Waits for: nothing. Consumes: (prompt, response) pairs. Produces: one dict of floats each, with `reward`."""

    def __init__(self, name: str):
        self.verifier = load_verifier(name)

    def pid(self) -> int:
        return os.getpid()

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Raises what the verifier raises; nothing here turns a failure into a number."""
        return [score(self.verifier, prompt, response) for prompt, response in items]
