"""4×4 Sudoku: right or not, or cell by cell."""

from __future__ import annotations

from collections.abc import Iterator

from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import answers

DIGITS = set("1234")
BLANKS = "_0."
UNITS = tuple(
    [tuple(range(4 * r, 4 * r + 4)) for r in range(4)]
    + [tuple(range(c, 16, 4)) for c in range(4)]
    + [tuple(4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)) for r in (0, 2) for c in (0, 2)]
)
PEERS = tuple(tuple({i for unit in UNITS if cell in unit for i in unit} - {cell}) for cell in range(16))


def verify(prompt: Prompt, response: str, *, extract: str = "whole", partial: bool = False) -> float | dict[str, float]:
    """1 if and only if the 16 digits keep the clues and fill every row, column and box with 1 to 4; else 0.

    prompt.answer["clues"]: 16 cells row by row, `_`, `0` or `.` for blanks; ["solution"]: 16 digits, optional. extract: where
    the answer stands, see `answers.extract`; from anywhere but the whole response only its digits are read. partial: the
    reward is the share of the blanks that are filled as in the solution (of several, the one that agrees best), of the first
    16 digits; `correct` is then apart. Source of the share: d1 (arXiv 2504.12216).
    """
    clues = prompt.answer["clues"]
    cells = response
    if extract != "whole":
        cells = "".join(cell for cell in answers.extract(response, extract) or "" if cell.isdecimal())
    correct = float(
        len(cells) == 16
        and all(clue in BLANKS or clue == cell for clue, cell in zip(clues, cells, strict=True))
        and all({cells[i] for i in unit} == DIGITS for unit in UNITS)
    )
    return {"reward": _share(prompt, cells), "correct": correct} if partial else correct


def check(prompt: Prompt) -> None:
    """Raises DataError unless there are 16 cells and a way to fill them."""
    clues = prompt.answer.get("clues")
    if not isinstance(clues, str) or len(clues) != 16 or not set(clues) <= DIGITS | set(BLANKS):
        raise DataError(f"clues={clues!r}: 16 cells are needed, 1 to 4 or one of {BLANKS} for a blank")
    if next(solutions(clues), None) is None:
        raise DataError(f"clues={clues}: no grid keeps them")


def solutions(clues: str) -> Iterator[str]:
    """The grids that keep the clues, in ascending order."""
    blank = next((i for i, clue in enumerate(clues) if clue in BLANKS), None)
    if blank is None:
        if all({clues[i] for i in unit} == DIGITS for unit in UNITS):
            yield clues
        return
    for digit in sorted(DIGITS - {clues[i] for i in PEERS[blank]}):
        yield from solutions(clues[:blank] + digit + clues[blank + 1 :])


def _share(prompt: Prompt, cells: str) -> float:
    clues, known = prompt.answer["clues"], prompt.answer.get("solution")
    blanks = [i for i, clue in enumerate(clues) if clue in BLANKS]
    filled = cells[:16].ljust(16, "0")
    grids = [known] if known else solutions(clues)
    return max((sum(filled[i] == grid[i] for i in blanks) for grid in grids), default=0) / max(1, len(blanks))
