"""4×4 Sudoku: right or not."""

from __future__ import annotations

from rlpipe.trajectory import Prompt

DIGITS = set("1234")
UNITS = tuple(
    [tuple(range(4 * r, 4 * r + 4)) for r in range(4)]
    + [tuple(range(c, 16, 4)) for c in range(4)]
    + [tuple(4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)) for r in (0, 2) for c in (0, 2)]
)


def verify(prompt: Prompt, response: str) -> float:
    """1 if and only if the 16 digits keep the clues and fill every row, column and box with 1 to 4; else 0.

    prompt.answer["clues"]: 16 cells row by row, `_` for blanks.
    """
    clues = prompt.answer["clues"]
    if len(response) != 16 or any(clue not in ("_", cell) for clue, cell in zip(clues, response, strict=True)):
        return 0.0
    return float(all({response[i] for i in unit} == DIGITS for unit in UNITS))
