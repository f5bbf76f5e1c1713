"""Verifiers that fail in every way, for responses that ask for it."""

import os
import time
from pathlib import Path

from rlpipe.trajectory import Prompt


def misbehave(prompt: Prompt, response: str) -> float:
    """'raise', 'die', 'hang' do so every time; 'once PATH' dies the first time it is seen."""
    if response == "raise":
        raise RuntimeError("I cannot judge this")
    if response == "die":
        os._exit(1)
    if response == "hang":
        time.sleep(600)
    if response.startswith("once "):
        marker = Path(response[5:])
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), 9)
    if response == "slow":
        time.sleep(0.3)
    return 1.0
