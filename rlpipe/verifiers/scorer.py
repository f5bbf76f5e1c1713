"""What a recipe asks of a response: one verifier, or several that count by weight; a prompt may bring its own."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rlpipe.config import VerifierConfig
from rlpipe.errors import ConfigError, RlpipeError, VerifierFailed
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.registry import BUILT_IN, Verifier, checked, correctness, hook, load_verifier, options_of, score

TASK = "task"  # the part that is the prompt's own verifier
SHARED = ("sandbox",)  # keys of the section that are options of verifiers, too


class Scorer:
    """Section `verifier` of a recipe, at work. default_name: the task's own verifier, for an empty `verifier.name`.

    Without `verifier.parts` a response is judged by the verifier its prompt names, otherwise by `verifier.name`. With parts, by
    all of them: `reward` is the sum of weight · reward, every part is logged under its name (a user function's is the
    function's), what else a part returns as NAME_KEY, and `correct` is what the first part calls correct. A part called `task`
    is the verifier that would judge without parts. Verifiers are loaded when a prompt first needs them.

    Options are the keyword-only parameters of verifiers: under a verifier's name they are its own, all others go to every
    verifier that has them. Raises ConfigError, with the nearest name, for a verifier, a part or an option that does not exist.
    """

    def __init__(self, cfg: VerifierConfig, default_name: str):
        self.cfg, self.name = cfg, cfg.name or default_name
        self.loaded: dict[str, Verifier] = {}
        self.labels = {name: _label(name) for name in cfg.parts}
        _check_labels(self.labels)
        if cfg.parts and not (any(cfg.parts.values()) and all(map(math.isfinite, cfg.parts.values()))):
            raise ConfigError(f"verifier.parts={cfg.parts}: the weights must be finite numbers, not all 0")
        needed = [self.name if name == TASK else name for name in cfg.parts] or [self.name]
        self._check_options(needed)
        for name in needed:
            self.verifier(name)

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} {name}" for name, weight in self.cfg.parts.items()) or self.name

    def verifier(self, name: str) -> Verifier:
        if name not in self.loaded:
            known = options_of(load_verifier(name))
            mine = {key: getattr(self.cfg, key) for key in SHARED if key in known and hasattr(self.cfg, key)}
            mine |= {key: value for key, value in self.cfg.options.items() if key in known}
            mine |= self.cfg.options.get(name, {}) if isinstance(self.cfg.options.get(name), Mapping) else {}
            self.loaded[name] = load_verifier(name, mine)
        return self.loaded[name]

    def names(self, prompt: Prompt) -> list[str]:
        """The verifiers that judge responses to a prompt."""
        own = prompt.verifier or self.name
        return [own if name == TASK else name for name in self.cfg.parts] or [own]

    def prepare(self) -> None:
        """Start what takes long, without waiting for it."""
        self._call("prepare")

    def release(self) -> None:
        """End what `prepare`, or a verdict, has started."""
        self._call("release")

    def _call(self, name: str) -> None:
        for found in (hook(verifier, name) for verifier in self.loaded.values()):
            if found is not None:
                found()

    def longest(self, prompt: Prompt) -> float:
        """Seconds that a verdict can take before its verifiers end it themselves; 0 for those that set themselves no limit, and
        for a prompt that cannot be judged: judging it says why."""
        seconds = 0.0
        try:
            for name in self.names(prompt):
                seconds += self._limit(name, prompt)
        except RlpipeError:
            return 0.0
        return seconds

    def _limit(self, name: str, prompt: Prompt) -> float:
        verifier = self.verifier(name)
        limit = hook(verifier, "longest")
        return limit(prompt, **getattr(verifier, "keywords", {})) if limit is not None else 0.0

    def longest_of(self, prompts: Sequence[Prompt]) -> float:
        """Seconds that the verdicts of one call can take before their verifiers end them, as `longest`: those of verifiers that
        judge many at once count once, not for each response."""
        each, together = 0.0, {}
        for prompt in prompts:
            try:
                limits = [(name, self._limit(name, prompt)) for name in self.names(prompt)]
            except RlpipeError:  # as in `longest`
                continue
            for name, seconds in limits:
                if self._judges_many(name):
                    together[name] = max(together.get(name, 0.0), seconds)
                else:
                    each += seconds
        return each + sum(together.values())

    def score(self, prompt: Prompt, response: str) -> dict[str, float]:
        """The verdict: finite floats, `reward` among them. Raises what a verifier raises: no failure becomes a number."""
        (verdict,) = self.score_many([(prompt, response)])
        return verdict

    def score_many(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """The verdict of each, in order; verifiers that can judge many at once are given all of theirs together, others one
        after another. Raises as `score`, for the first of them that has no verdict."""
        names = [self.names(prompt) for prompt, _ in items]
        known: dict[tuple[str, int], dict[str, float]] = {}
        for name in dict.fromkeys(name for own in names for name in own):
            if self._judges_many(name):
                places = [place for place, own in enumerate(names) if name in own]
                known |= zip(
                    [(name, place) for place in places], self._judge_many(name, [items[i] for i in places]), strict=True
                )

        def verdict(name: str, place: int) -> dict[str, float]:
            ready = known.get((name, place))
            return score(self.verifier(name), *items[place]) if ready is None else ready

        return [
            self._combined([verdict(name, place) for name in own]) if self.cfg.parts else verdict(own[0], place)
            for place, own in enumerate(names)
        ]

    def _judges_many(self, name: str) -> bool:
        return hook(self.verifier(name), "judge_many") is not None

    def _judge_many(self, name: str, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        verifier, verdicts = self.verifier(name), []
        for (prompt, _), found in zip(items, hook(self.verifier(name), "judge_many")(items), strict=True):
            if isinstance(found, VerifierFailed):
                raise found
            verdicts.append(checked(verifier, prompt, found))
        return verdicts

    def _combined(self, verdicts: Sequence[dict[str, float]]) -> dict[str, float]:
        """Of all parts, in their order."""
        total, combined = 0.0, {}
        for (part, weight), found in zip(self.cfg.parts.items(), verdicts, strict=True):
            label = self.labels[part]
            total += weight * found["reward"]
            combined.setdefault("correct", correctness(found))
            combined[label] = found["reward"]
            combined |= {f"{label}_{key}": value for key, value in found.items() if key != "reward"}
        return {"reward": total} | combined

    def _check_options(self, names: list[str]) -> None:
        """Options under a verifier's name are checked when it is loaded; any other must be known to one that is needed."""
        known = {option for name in names for option in options_of(load_verifier(name))}
        for key, value in self.cfg.options.items():
            if key in known or (isinstance(value, Mapping) and (key in names or key in BUILT_IN or ":" in key)):
                continue
            near = difflib.get_close_matches(key, [*sorted(known), *names], n=1, cutoff=0.0)[0]
            listed = ", ".join(sorted(known)) or "none"
            raise ConfigError(
                f"verifier.options.{key}: {' and '.join(names)} have no such option; did you mean {near}? (known: {listed}; "
                "or VERIFIER: {OPTION: VALUE})"
            )


def _label(name: str) -> str:
    return name.rpartition(":")[2] if ":" in name else name


def _check_labels(labels: Mapping[str, Any]) -> None:
    taken: dict[str, str] = {"reward": "reward", "correct": "correct"}
    for name, label in labels.items():
        if label in taken:
            file = PurePath(name.rpartition(":")[0]).name or name
            raise ConfigError(
                f"verifier.parts: {name} would be logged as {label}, which is taken by {taken[label]}; rename the function in "
                f"{file}"
            )
        taken[label] = name
