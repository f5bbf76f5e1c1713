"""A language model as the judge, behind any OpenAI-compatible server; see `rubrics` for what it is asked."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlpipe.errors import ConfigError, DataError, ServerError, VerifierFailed
from rlpipe.serving.cache import key_of
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import rubrics, served

log = logging.getLogger("rlpipe")

NAME = "llm_judge"
VOTES = {"mean": statistics.fmean, "median": statistics.median, "lowest": min}


@dataclass
class LlmJudge:
    """A verifier with settings. Example: `LlmJudge(server={"url": "http://judge:8000/v1"}, template="score_1_10")`.

    template, pattern, values, scale, system: see `rubrics.rubric`. reference: the field of prompt.answer that {reference}
    stands for. max_tokens, temperature: of an answer. samples: answers to each response, each with a seed of its own, and
    votes: mean | median | lowest of what they say. seconds: of all requests of one call, however many responses it is for.
    at_once: requests in flight, of each verifier worker. extra: further fields of a request, e.g.
    {chat_template_kwargs: {enable_thinking: false}}.

    server and cache are filled in from section `judge` and the run's folder. An answer that was read is never asked for again
    with the same messages and settings; one that cannot be read is not kept.
    """

    template: str = "correctness"
    pattern: str = ""
    values: dict[str, float] = field(default_factory=dict)
    scale: list[float] = field(default_factory=list)
    system: str = ""
    reference: str = "answer"
    max_tokens: int = 512
    temperature: float = 0.0
    samples: int = 1
    votes: str = "mean"
    seconds: float = 60.0
    at_once: int = 64
    extra: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    cache: str = ""
    _holder: served.Holder = field(default_factory=served.Holder, init=False, repr=False)

    def check(self, prompt: Prompt) -> None:
        """Raises DataError for a record without the reference that the template shows, ConfigError for wrong options."""
        if self._rubric().needs_reference and not served.reference_of(prompt, self.reference):
            raise DataError(
                f"no text under {self.reference!r}, and the template {self.template[:40]!r} shows the judge a reference; "
                "verifier.options.reference names another field, template=correctness_no_reference needs none"
            )

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
        """A verdict for each, or why there is none: a server that gave no answer in time, an answer that cannot be read.

        `reward`; `cached`: the share of its answers that were known; with several samples also `agreement`: the share of the
        most frequent reward among them.
        """
        rubric, asked = self._rubric(), self._holder.get(NAME, self.server, self.cache, self.at_once)
        try:
            model = asked.client.model()
        except ServerError as error:
            return [served.failed(NAME, prompt, error) for prompt, _ in items]
        asking = [self._requests(rubric, model, prompt, response) for prompt, response in items]
        requests = {key: request for own in asking for key, request in own}
        known = asked.cache.get(requests)
        found: dict[str, float | Exception] = {key: rubrics.read(rubric, text) for key, text in known.items()}
        found |= self._ask(rubric, asked, {key: request for key, request in requests.items() if key not in known})
        log.info("%s: %d of %d answers were known", NAME, len(known), len(requests))
        return [
            self._verdict(prompt, [found[key] for key, _ in own], [key in known for key, _ in own])
            for (prompt, _), own in zip(items, asking, strict=True)
        ]

    def _rubric(self) -> rubrics.Rubric:
        if self.votes not in VOTES:
            raise ConfigError(f"verifier.options.votes={self.votes} is not one of {', '.join(VOTES)}")
        if self.samples < 1 or self.max_tokens < 1 or self.seconds <= 0 or self.at_once < 1:
            raise ConfigError("verifier.options: samples, max_tokens, at_once and seconds of llm_judge must be above 0")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"verifier.options.samples={self.samples} with temperature=0: all answers would be the same; raise temperature"
            )
        return rubrics.rubric(self.template, self.pattern, self.values, self.scale, self.system)

    def _requests(
        self, rubric: rubrics.Rubric, model: str, prompt: Prompt, response: str
    ) -> list[tuple[str, tuple[list[dict[str, str]], dict[str, Any]]]]:
        """(cache key, (messages, settings)) of every answer that a verdict needs."""
        messages = rubrics.messages(rubric, prompt.text, response, served.reference_of(prompt, self.reference))
        settings = {"max_tokens": self.max_tokens, "temperature": float(self.temperature)} | self.extra
        seeded = [settings | ({"seed": vote} if self.samples > 1 else {}) for vote in range(self.samples)]
        how = [rubric.pattern, dict(rubric.values), rubric.scale]
        return [(key_of(model, messages, own, how), (messages, own)) for own in seeded]

    def _ask(self, rubric: rubrics.Rubric, asked: served.Asked, requests: dict[str, Any]) -> dict[str, float | Exception]:
        replies = asked.client.chat_all(
            [messages for messages, _ in requests.values()],
            timeout_s=self.seconds,
            settings=[settings for _, settings in requests.values()],
        )
        found: dict[str, float | Exception] = {}
        readable = {}
        for key, reply in zip(requests, replies, strict=True):
            try:
                found[key] = self._read(rubric, reply)
                readable[key] = reply.text
            except (ServerError, VerifierFailed) as error:
                found[key] = error
        asked.cache.put(readable)
        return found

    def _read(self, rubric: rubrics.Rubric, reply: Any) -> float:
        if isinstance(reply, ServerError):
            raise reply
        if reply.cut:  # what stands last in it may be a quotation of the response
            raise VerifierFailed(
                f"the judge's answer was cut off after max_tokens={self.max_tokens}, so its verdict cannot be read: "
                f"{reply.text[-400:]!r}"
            )
        return rubrics.read(rubric, reply.text)

    def _verdict(
        self, prompt: Prompt, rewards: list[float | Exception], known: list[bool]
    ) -> dict[str, float] | VerifierFailed:
        for reward in rewards:
            if isinstance(reward, Exception):
                return served.failed(NAME, prompt, reward)
        verdict = {"reward": float(VOTES[self.votes](rewards)), "cached": statistics.fmean(known)}
        if len(rewards) > 1:
            verdict["agreement"] = max(map(rewards.count, rewards)) / len(rewards)
        return verdict


verify = LlmJudge()
