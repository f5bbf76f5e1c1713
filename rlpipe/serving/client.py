"""What the rest asks of a language-model server: conversations, continuations, scores, and a model's own next tokens.

The dialect is that of OpenAI's HTTP interface, which most servers speak; `greedy_next` and `scores` use what vLLM adds to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlpipe.errors import ServerError
from rlpipe.serving.address import finder
from rlpipe.serving.connection import Address, Connection

Messages = Sequence[Mapping[str, str]]
SCORED_BY = ("classify", "pooling", "score")
MODELS_S = 60.0  # to say what models there are


@dataclass(frozen=True, slots=True)
class Reply:
    """text: of the answer, without what a reasoning model thought before it, where the server tells them apart · cut: it ended
    because it had no tokens left · top: for each of its tokens the likeliest ones, text → log-probability, if asked for."""

    text: str
    cut: bool = False
    top: list[dict[str, float]] = field(default_factory=list)


class Client:
    """A server of one model, from any thread; see `Connection` for retries and deadlines. timeout_s: of a whole call, however
    many requests it makes. All calls raise ServerError, those for many (`…_all`) only give it back in its place.

    cfg: a `ServerConfig` or what has its url, model, key_env and start_timeout_s. A url `ray:NAME` is that of a server started
    with the run: its actor says where it is, and again when a connection fails, because it may have been started anew
    elsewhere. An empty model is the only one that the server has.
    """

    def __init__(self, cfg: Any, what: str = "the server", at_once: int = 64):
        key = os.environ.get(cfg.key_env, "") if cfg.key_env else ""
        if cfg.key_env and not key:
            raise ServerError(f"{what}: the environment variable {cfg.key_env} (key_env) is not set or empty in this process")
        if not cfg.url:
            raise ServerError(f"{what} has no url; give the URL of one that is there, or a model to start one for")
        place = finder(cfg.url, what, cfg.start_timeout_s) or Address.of(cfg.url, key)
        self.connection = Connection(place, what, at_once)
        self.what, self._model = what, cfg.model

    def model(self) -> str:
        """The name that requests give."""
        if not self._model:
            listed = self.connection.ask("/v1/models", None, MODELS_S)
            with _reading(self.what, listed):
                names = [entry["id"] for entry in listed["data"]]
            if len(names) != 1:
                raise ServerError(f"{self.what} has {len(names)} models ({', '.join(names[:20])}); say which one (model)")
            self._model = names[0]
        return self._model

    def chat(self, messages: Messages, *, timeout_s: float, **settings: Any) -> Reply:
        """The answer to a conversation of {"role", "content"}; settings: any others of the interface, e.g. max_tokens."""
        return _one(self.chat_all([messages], timeout_s=timeout_s, settings=[settings]))

    def chat_all(
        self, conversations: Sequence[Messages], *, timeout_s: float, settings: Sequence[Mapping[str, Any]]
    ) -> list[Reply | ServerError]:
        """All conversations at once, each with settings of its own."""
        bodies = [
            {"model": self.model(), "messages": list(messages)} | dict(own)
            for messages, own in zip(conversations, settings, strict=True)
        ]
        return self._read_all("/v1/chat/completions", bodies, timeout_s, _chat_reply)

    def complete(self, prompt: str | Sequence[int], *, timeout_s: float, **settings: Any) -> Reply:
        """The continuation of a text, or of token ids."""
        body = {"model": self.model(), "prompt": prompt if isinstance(prompt, str) else list(map(int, prompt))} | settings
        return _one(self._read_all("/v1/completions", [body], timeout_s, lambda answer: _completion(answer["choices"][0])))

    def greedy_next(self, tokens: Sequence[Sequence[int]], *, timeout_s: float) -> list[np.ndarray]:
        """Of each token sequence, n ids: int32[n], the token that the model finds likeliest after each position, of equally
        likely ones that with the smallest id. One request for all of them, and for each one forward pass over it.

        The n - 1 first are read from the log-probabilities of the prompt (vLLM's `prompt_logprobs`), the last is the one token
        that is generated, without penalties, so that sampling defaults of the model's folder change nothing.
        """
        if not all(len(sequence) for sequence in tokens):
            raise ValueError("a sequence of no tokens has no next token")
        body = {
            "model": self.model(), "prompt": [list(map(int, sequence)) for sequence in tokens], "max_tokens": 1,
            "temperature": 0.0, "prompt_logprobs": 1, "return_token_ids": True, "ignore_eos": True, "repetition_penalty": 1.0,
        }  # fmt: skip
        if not tokens:
            return []
        answer = self.connection.ask("/v1/completions", body, timeout_s)
        with _reading(self.what, answer):
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != len(tokens) or any(choice.get("prompt_logprobs") is None for choice in choices):
                raise ServerError(
                    f"{self.what} gives no log-probabilities of prompts (prompt_logprobs): a guide must be a server of vLLM, "
                    "or one that answers /v1/completions with token ids as vLLM does"
                )
            return [_likeliest(choice, len(sequence)) for choice, sequence in zip(choices, tokens, strict=True)]

    def scores(
        self, pairs: Sequence[tuple[str, str]], *, by: str, timeout_s: float, label: int = 0, **settings: Any
    ) -> list[float | ServerError]:
        """Of each (prompt, response) the number that a reward model gives it, before any activation function.

        by: classify and pooling show it as a conversation of two turns, score as a pair of texts; label: which of a
        classifier's outputs; of pooling, which answers for every token, it is the last token's; settings: further fields of
        every request.
        """
        turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
        inputs = {
            "classify": [{"messages": own} for own in turns],
            "pooling": [{"messages": own} for own in turns],
            "score": [{"text_1": a, "text_2": b} for a, b in pairs],
        }[by]
        bodies = [{"model": self.model(), "use_activation": False} | own | settings for own in inputs]
        read = {
            "classify": lambda answer: float(answer["data"][0]["probs"][label]),
            "pooling": lambda answer: float(np.asarray(answer["data"][0]["data"], np.float64).reshape(-1)[-1]),
            "score": lambda answer: float(answer["data"][0]["score"]),
        }[by]
        return self._read_all(f"/{by}", bodies, timeout_s, read)

    def tokenize(self, text: str, *, timeout_s: float) -> list[int]:
        """The text as the server's tokenizer splits it, without special tokens (vLLM's /tokenize)."""
        body = {"model": self.model(), "prompt": text, "add_special_tokens": False}
        answer = self.connection.ask("/tokenize", body, timeout_s)
        with _reading(self.what, answer):
            return [int(token) for token in answer["tokens"]]

    def close(self) -> None:
        self.connection.close()

    def _read_all(self, path: str, bodies: Sequence[Mapping[str, Any]], timeout_s: float, read) -> list[Any]:
        found: list[Any] = []
        for answer in self.connection.ask_all(path, bodies, timeout_s):
            try:
                with _reading(self.what, answer):
                    found.append(answer if isinstance(answer, ServerError) else read(answer))
            except ServerError as error:
                found.append(error)
        return found


class _reading:
    """A context in which an answer of another shape than expected is a ServerError that shows it."""

    def __init__(self, what: str, answer: Any):
        self.what, self.answer = what, answer

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (KeyError, IndexError, TypeError, ValueError, AttributeError)):
            shown = f"{str(self.answer)[:300]} ({type(error).__name__}: {error})"
            raise ServerError(f"{self.what} answered something unexpected: {shown}") from error


def _one(answers: list[Reply | ServerError]) -> Reply:
    if isinstance(answers[0], ServerError):
        raise answers[0]
    return answers[0]


def _chat_reply(answer: dict[str, Any]) -> Reply:
    choice = answer["choices"][0]
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    top = [{entry["token"]: float(entry["logprob"]) for entry in token["top_logprobs"]} for token in logprobs]
    return Reply(_text(choice["message"]["content"] or ""), choice.get("finish_reason") == "length", top)


def _completion(choice: dict[str, Any]) -> Reply:
    top = [dict(entries or {}) for entries in (choice.get("logprobs") or {}).get("top_logprobs") or []]
    return Reply(_text(choice["text"]), choice.get("finish_reason") == "length", top)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text was expected, not {value!r:.80}")
    return value


def _likeliest(choice: dict[str, Any], length: int) -> np.ndarray:
    """int32[length] of one choice; its first position has no log-probabilities, because nothing stands before it."""
    listed = choice["prompt_logprobs"][1:]
    if len(listed) != length - 1:
        raise ValueError(f"{len(listed) + 1} positions for {length} tokens")
    best = [min(entry, key=lambda token: (-entry[token]["logprob"], int(token))) for entry in listed]
    return np.array([*map(int, best), int(choice["token_ids"][0])], np.int32)
