"""Countdown: reach a target with given numbers. Small numbers and a small vocabulary, so that a tiny model can play."""

from __future__ import annotations

from rlpipe.data.source import PromptSource, held_out, stable_generator
from rlpipe.errors import ConfigError
from rlpipe.trajectory import Prompt


class Countdown(PromptSource):
    """Prompt: `3 5 7=22` · response: an expression over exactly those numbers, such as `3*5+7`. Always solvable.

    numbers: how many · max_number: the largest · operations: a subset of +-* · careless: share of demonstrations with the right
    numbers and a wrong value.
    """

    task, verifier, alphabet = "countdown", "countdown", "0123456789+-*/()= "

    def __init__(self, seed: int, *, numbers: int = 3, max_number: int = 9, operations: str = "+-*", careless: float = 0.0):
        if not 2 <= numbers <= 6 or max_number < 2 or not operations or not set(operations) <= set("+-*"):
            raise ConfigError("countdown needs 2 to 6 numbers, max_number of at least 2 and operations out of +-*")
        self.seed, self.numbers, self.max_number = seed, numbers, max_number
        self.operations, self.careless = operations, careless

    def _puzzle(self, test: bool, *key: object) -> tuple[list[int], int, str]:
        """(numbers as shown, target, an expression that reaches it), on the wanted side of the split."""
        rng = stable_generator("countdown", *key)
        while True:
            order = [rng.randint(1, self.max_number) for _ in range(self.numbers)]
            expression = str(order[0]) + "".join(rng.choice(self.operations) + str(n) for n in order[1:])
            target = _value(expression)
            shown = sorted(order)
            if target >= 0 and held_out(_text(shown, target)) == test:
                return shown, target, expression

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
        return [self._make("test", i, *self._puzzle(True, "test", i)[:2]) for i in range(count)]

    def demonstration(self, index: int) -> Prompt:
        shown, target, expression = self._puzzle(False, self.seed, "demonstration", index)
        rng = stable_generator("solver", self.seed, index)
        if rng.random() < self.careless:
            for _ in range(20):  # another expression over the same numbers; now and then every one reaches the target
                order = rng.sample(shown, len(shown))
                other = str(order[0]) + "".join(rng.choice(self.operations) + str(n) for n in order[1:])
                if _value(other) != target:
                    expression = other
                    break
        return self._make("demonstration", index, shown, target, expression)


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
