"""Countdown: reach a target with given numbers. Small numbers and a small vocabulary, so that a tiny model can play."""

from __future__ import annotations

import random
from itertools import count as integers

from rlpipe.data.source import ATTEMPTS, PromptSource, distinct, held_out, share, stable_generator, whole_number
from rlpipe.errors import ConfigError
from rlpipe.trajectory import Prompt


class Countdown(PromptSource):
    """Prompt: `3 5 7=22` · response: an expression over exactly those numbers, such as `3*5+7`. Always solvable.

    numbers: how many · max_number: the largest · operations: a subset of +-* · careless: share of demonstrations with
    the right numbers and a wrong value; puzzles whose every order and choice of operations is right are replaced.
    `max_response_chars` is the length without brackets, which every puzzle can be solved with. Raises ConfigError
    for options without puzzles.
    """

    task, verifier, alphabet = "countdown", "countdown", " ()*+-/0123456789="

    def __init__(self, seed: int, *, numbers: int = 3, max_number: int = 9, operations: str = "+-*", careless: float = 0.0):
        if not isinstance(operations, str) or not operations or not set(operations) <= set("+-*"):
            raise ConfigError(f"data.options.operations={operations!r}: task countdown needs one or more of + - *")
        self.seed, self.operations = seed, operations
        self.numbers = whole_number("countdown", "numbers", numbers, 2, 6)
        self.max_number = whole_number("countdown", "max_number", max_number, 2, 999)
        self.careless = share("countdown", "careless", careless)
        self.max_response_chars = numbers * len(str(max_number)) + numbers - 1
        self.identity = f"countdown(seed={seed}, numbers={numbers}, max_number={max_number}, operations={operations})"
        if self.careless and set(operations) in ({"+"}, {"*"}):
            raise ConfigError(
                f"data.options.careless={careless}: with operations={operations} every expression reaches the target"
            )

    def _puzzle(self, test: bool, *key: object) -> tuple[list[int], int, str]:
        """(numbers as shown, target, an expression that reaches it), on the wanted side of the split."""
        rng = stable_generator("countdown", *key)
        for _ in range(ATTEMPTS):
            order = [rng.randint(1, self.max_number) for _ in range(self.numbers)]
            expression = self._join(order, rng)
            target = _value(expression)
            shown = sorted(order)
            if target >= 0 and held_out(_text(shown, target)) == test:
                return shown, target, expression
        raise ConfigError(
            f"no {'held-out' if test else 'training'} puzzle in {ATTEMPTS} draws of {self.identity}; raise "
            "data.options.max_number or numbers, or allow more operations"
        )

    def _join(self, order: list[int], rng: random.Random) -> str:
        return str(order[0]) + "".join(rng.choice(self.operations) + str(n) for n in order[1:])

    def _make(self, kind: str, index: int, shown: list[int], target: int, demonstration: str | None = None) -> Prompt:
        return Prompt(
            uid=f"countdown/{kind}/{index}",
            task="countdown",
            text=_text(shown, target),
            answer={"numbers": shown, "target": target},
            demonstration=demonstration,
        )

    def prompt(self, index: int) -> Prompt:
        return self._make("train", index, *self._puzzle(False, self.seed, "train", index)[:2])

    def test_prompts(self, count: int) -> list[Prompt]:
        return distinct((self._make("test", i, *self._puzzle(True, "test", i)[:2]) for i in integers()), count)

    def demonstration(self, index: int) -> Prompt:
        shown, target, expression = self._puzzle(False, self.seed, "demonstration", index)
        rng = stable_generator("solver", self.seed, index)
        if rng.random() >= self.careless:
            return self._make("demonstration", index, shown, target, expression)
        for attempt in range(1, ATTEMPTS):
            for _ in range(20):
                wrong = self._join(rng.sample(shown, len(shown)), rng)
                if _value(wrong) != target:
                    return self._make("demonstration", index, shown, target, wrong)
            shown, target, _ = self._puzzle(False, self.seed, "demonstration", index, attempt)
        raise ConfigError(f"no puzzle of {self.identity} can be answered wrongly; set data.options.careless=0")


def _text(shown: list[int], target: int) -> str:
    return f"{' '.join(map(str, shown))}={target}"


def _value(expression: str) -> int:
    """Value of digits joined by + - *, with the usual precedence."""
    total = 0
    for term in expression.replace("-", "+-").split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor)
        total += product
    return total
