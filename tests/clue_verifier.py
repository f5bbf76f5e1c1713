"""A user's verifier, as a recipe names it: `verifier.name=tests/clue_verifier.py:share`. Dense, so that short runs learn."""

from rlpipe.trajectory import Prompt


def share(prompt: Prompt, response: str) -> dict[str, float]:
    """The share of clues that the response repeats, and the share of its characters that are digits."""
    clues = [(i, c) for i, c in enumerate(prompt.text) if c != "_"]
    kept = sum(response[i : i + 1] == c for i, c in clues) / len(clues)
    return {"reward": kept, "digits": sum(c.isdigit() for c in response) / max(1, len(response))}


def opening(prompt: Prompt, response: str) -> float:
    """1 if the response begins with a 1: decoded from left to right, every later state shows the reward."""
    return float(response[:1] == "1")
