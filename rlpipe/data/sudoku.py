"""4×4 Sudoku puzzles, with demonstrations from a careful and a careless solver."""

from __future__ import annotations

from functools import cache
from itertools import count as integers
from itertools import permutations

from rlpipe.data.source import ATTEMPTS, PromptSource, distinct, held_out, share, stable_generator, whole_number
from rlpipe.errors import ConfigError
from rlpipe.trajectory import Prompt


@cache
def grids() -> tuple[str, ...]:
    """The 288 solved grids, each 16 digits row by row."""
    rows = ["".join(row) for row in permutations("1234")]
    found = []

    def extend(grid: tuple[str, ...]) -> None:
        if len(grid) == 4:
            found.append("".join(grid))
            return
        for row in rows:
            if all(row[c] != above[c] for above in grid for c in range(4)) and _boxes_differ(grid, row):
                extend((*grid, row))

    extend(())
    return tuple(found)


def _boxes_differ(grid: tuple[str, ...], row: str) -> bool:
    if len(grid) % 2 == 0:
        return True
    return all(len({*grid[-1][h : h + 2], *row[h : h + 2]}) == 4 for h in (0, 2))


def careless(clues: str) -> str:
    """Fill each row's blanks with its missing digits in ascending order; columns and boxes are ignored."""
    filled = []
    for start in range(0, 16, 4):
        row = clues[start : start + 4]
        missing = iter(sorted(set("1234") - set(row)))
        filled += [next(missing) if cell == "_" else cell for cell in row]
    return "".join(filled)


def solved(grid: str) -> bool:
    return grid in grids()


def solutions(clues: str) -> int:
    """How many of the solved grids keep the clues."""
    given = [(i, clue) for i, clue in enumerate(clues) if clue != "_"]
    return sum(all(grid[i] == clue for i, clue in given) for grid in grids())


class Sudoku(PromptSource):
    """Prompt: 16 cells row by row, `_` for blanks, 5 to 8 clues by default. Response: 16 digits, no EOS needed.

    unique: only puzzles with one solution; otherwise any solution is right · careless: share of demonstrations from the
    careless solver; those that happen to be right are replaced by another puzzle's, so that it never yields a correct
    grid. Raises ConfigError for options without puzzles.
    """

    task, verifier, alphabet, max_response_chars = "sudoku", "sudoku", "1234_", 16

    def __init__(self, seed: int, *, clues_low: int = 5, clues_high: int = 8, unique: bool = False, careless: float = 0.0):
        # 15 clues leave one blank, which even the careless solver fills rightly; a single solution takes 4 clues
        low = whole_number("sudoku", "clues_low", clues_low, 4 if unique else 1, 14)
        high = whole_number("sudoku", "clues_high", clues_high, low, 14)
        if not isinstance(unique, bool):
            raise ConfigError(f"data.options.unique={unique!r}: task sudoku needs true or false")
        self.seed, self.clues, self.unique = seed, (low, high), unique
        self.careless = share("sudoku", "careless", careless)
        self.identity = f"sudoku(seed={seed}, clues={low}-{high}, unique={unique})"

    def _puzzle(self, test: bool, *key: object) -> tuple[str, str]:
        """(clues, solution) on the wanted side of the split."""
        rng = stable_generator("sudoku", *key)
        for _ in range(ATTEMPTS):
            grid = rng.choice(grids())
            kept = set(rng.sample(range(16), rng.randint(*self.clues)))
            clues = "".join(cell if i in kept else "_" for i, cell in enumerate(grid))
            if held_out(clues) == test and (not self.unique or solutions(clues) == 1):
                return clues, grid
        raise ConfigError(
            f"no puzzle found in {ATTEMPTS} draws of {self.identity}; raise data.options.clues_high or set unique=false"
        )

    def _make(self, kind: str, index: int, clues: str, demonstration: str | None = None) -> Prompt:
        answer = {"clues": clues}
        return Prompt(uid=f"sudoku/{kind}/{index}", task="sudoku", text=clues, answer=answer, demonstration=demonstration)

    def prompt(self, index: int) -> Prompt:
        return self._make("train", index, self._puzzle(False, self.seed, "train", index)[0])

    def test_prompts(self, count: int) -> list[Prompt]:
        return distinct((self._make("test", i, self._puzzle(True, "test", i)[0]) for i in integers()), count)

    def demonstration(self, index: int) -> Prompt:
        sloppy = stable_generator("solver", self.seed, index).random() < self.careless
        clues, grid = self._puzzle(False, self.seed, "demonstration", index)
        attempt = 0
        while sloppy and solved(careless(clues)):
            attempt += 1
            if attempt == ATTEMPTS:
                raise ConfigError(f"{self.identity} has no puzzle that the careless solver gets wrong; lower clues_low")
            clues, grid = self._puzzle(False, self.seed, "demonstration", index, attempt)
        return self._make("demonstration", index, clues, careless(clues) if sloppy else grid)
