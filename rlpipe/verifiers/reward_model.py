"""A number from a reward model behind a server: a trained one's own score, or how likely a language model finds "yes"."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpipe.errors import ConfigError, DataError, ServerError, VerifierFailed
from rlpipe.serving.cache import key_of
from rlpipe.serving.client import SCORED_BY
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import rubrics, served

NAME = "reward_model"
YES_NO = "yes_no"
SQUASH = {
    "none": float,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)),
    "tanh": math.tanh,
}
TOP = 20  # likeliest tokens that are asked for: as many as servers give by default
QUESTION = (
    rubrics.QUESTION + rubrics.ANSWER + "Does the response do what the task asks, and is its result right? Answer with one "
    "word, Yes or No."
)


@dataclass
class RewardModel:
    """A verifier with settings. Example: `RewardModel(server={"url": "http://rm:8000/v1"}, by="classify", squash="sigmoid")`.

    by: classify (one output of a sequence classifier, number `label`; as most published reward models are), pooling (the last
    token's number), score (a cross-encoder's, of the pair), all three without their own activation function; or yes_no: the
    share of "yes" in the probability of "yes" and "no" as the first token of a language model's answer to `template`, a text
    with {response} and perhaps {prompt} and {reference} (field `reference` of prompt.answer), or a file that holds one.

    The reward is squash((number - offset) / divisor); squash: none | sigmoid | tanh. seconds, at_once, extra, server, cache: as
    of the verifier llm_judge. Prompt and response reach the model with turn markers broken, see `rubrics.harmless`.
    """

    by: str = "classify"
    label: int = 0
    template: str = QUESTION
    system: str = ""
    reference: str = "answer"
    squash: str = "none"
    offset: float = 0.0
    divisor: float = 1.0
    seconds: float = 60.0
    at_once: int = 64
    extra: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    cache: str = ""
    _holder: served.Holder = field(default_factory=served.Holder, init=False, repr=False)

    def check(self, prompt: Prompt) -> None:
        """Raises ConfigError for wrong options, DataError for a record without the reference that the template shows."""
        rubric = self._rubric()
        if self.by == YES_NO and rubric.needs_reference and not served.reference_of(prompt, self.reference):
            raise DataError(f"no text under {self.reference!r}, and the template shows a reference")

    def longest(self, prompt: Prompt) -> float:
        """Seconds of one call."""
        return served.longest(self.seconds, self.server)

    def release(self) -> None:
        """Closes the connections and the cache; the next use opens them again."""
        self._holder.release()

    def __call__(self, prompt: Prompt, response: str) -> dict[str, float]:
        (verdict,) = self.judge_many([(prompt, response)])
        if isinstance(verdict, VerifierFailed):
            raise verdict
        return verdict

    def judge_many(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float] | VerifierFailed]:
        """For each `reward`, `score` (the number itself) and `cached` (1: it was known); or why there is none."""
        rubric, asked = self._rubric(), self._holder.get(NAME, self.server, self.cache, self.at_once)
        try:
            model = asked.client.model()
        except ServerError as error:
            return [served.failed(NAME, prompt, error) for prompt, _ in items]
        inputs = [self._input(rubric, prompt, response) for prompt, response in items]
        keys = [key_of(NAME, model, self.by, self.label, own, self.extra) for own in inputs]
        known = {key: json.loads(text) for key, text in asked.cache.get(keys).items()}
        missing = {key: own for key, own in zip(keys, inputs, strict=True) if key not in known}
        found = known | dict(zip(missing, self._numbers(asked, list(missing.values())), strict=True))
        kept = [key for key in missing if isinstance(found[key], float) and math.isfinite(found[key])]
        asked.cache.put({key: json.dumps(found[key]) for key in kept})
        return [self._verdict(prompt, found[key], key in known) for (prompt, _), key in zip(items, keys, strict=True)]

    def _rubric(self) -> rubrics.Rubric:
        if self.by not in (*SCORED_BY, YES_NO):
            near = difflib.get_close_matches(self.by, (*SCORED_BY, YES_NO), n=1, cutoff=0.0)[0]
            raise ConfigError(f"verifier.options.by={self.by}: {', '.join(SCORED_BY)} or {YES_NO}; did you mean {near}?")
        if self.squash not in SQUASH:
            raise ConfigError(f"verifier.options.squash={self.squash} is not one of {', '.join(SQUASH)}")
        if self.divisor == 0 or self.seconds <= 0 or self.at_once < 1:
            raise ConfigError("verifier.options: divisor of reward_model must not be 0, seconds and at_once must be above 0")
        return rubrics.rubric(self.template, "(yes|no)", {"yes": 1.0, "no": 0.0}, [], self.system)

    def _input(self, rubric: rubrics.Rubric, prompt: Prompt, response: str) -> Any:
        if self.by == YES_NO:
            return rubrics.messages(rubric, prompt.text, response, served.reference_of(prompt, self.reference))
        return [rubrics.harmless(prompt.text), rubrics.harmless(response)]

    def _numbers(self, asked: served.Asked, inputs: list[Any]) -> list[float | Exception]:
        if self.by != YES_NO:
            return asked.client.scores(inputs, by=self.by, label=self.label, timeout_s=self.seconds, **self.extra)
        settings = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": TOP} | self.extra
        replies = asked.client.chat_all(inputs, timeout_s=self.seconds, settings=[settings] * len(inputs))
        return [reply if isinstance(reply, ServerError) else _share_of_yes(reply) for reply in replies]

    def _verdict(self, prompt: Prompt, number: float | Exception, known: bool) -> dict[str, float] | VerifierFailed:
        if isinstance(number, Exception):
            return served.failed(NAME, prompt, number)
        if not math.isfinite(number):
            return served.failed(NAME, prompt, f"the server's number is {number}")
        reward = SQUASH[self.squash]((number - self.offset) / self.divisor)
        return {"reward": reward, "score": number, "cached": float(known)}


def _share_of_yes(reply: Any) -> float | VerifierFailed:
    """p(yes) / (p(yes) + p(no)) of the first token, in any spelling; one that is not among the likeliest counts as 0."""
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in (reply.top[0] if reply.top else {}).items():
        word = token.strip(" \n\t*\"'.▁Ġ").lower()
        if word in mass:
            mass[word] += math.exp(logprob)
    if not sum(mass.values()):
        return VerifierFailed(f"neither yes nor no is among the {TOP} likeliest first tokens: {reply.top[:1]} ({reply.text!r})")
    return mass["yes"] / sum(mass.values())


verify = RewardModel()
