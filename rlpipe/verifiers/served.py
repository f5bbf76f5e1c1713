"""What the verifiers that ask a server have in common: which server, one client a process, and how they get at both."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from rlpipe.config import ServerConfig, VerifierConfig
from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.server_settings import ASKING, STARTED
from rlpipe.serving.cache import AnswerCache
from rlpipe.serving.client import MODELS_S, Client
from rlpipe.trajectory import Prompt

TELLING_S = 15.0  # past a call's deadline, until its worker counts as lost


def with_server(cfg: VerifierConfig, server: ServerConfig, cache: str) -> VerifierConfig:
    """Section `verifier`, with section `judge` as an option of the verifiers that ask its server, whichever of them a prompt
    may name; unchanged if there is no judge. cache: folder of the answers, see `AnswerCache`."""
    if not server.url:
        return cfg
    own = {"server": dataclasses.asdict(server), "cache": cache}
    options = dict(cfg.options)
    for name in ASKING:
        said = options.get(name, {})
        options[name] = own | dict(said) if isinstance(said, Mapping) else said
    return dataclasses.replace(cfg, options=options)


class Asked:
    """The client and the cache of one verifier, made at its first request."""

    def __init__(self, name: str, server: Mapping[str, Any], folder: str, at_once: int):
        if not server.get("url"):
            raise ConfigError(
                f"verifier {name} asks a server, and there is none: judge.url=http://HOST:PORT/v1 for one that is there, or "
                "judge.model=FOLDER-OR-HUB-ID for one that is started with the run"
            )
        self.cfg = ServerConfig(**server)
        self.client = Client(self.cfg, "the judge's server", at_once)
        self.cache = AnswerCache(folder)

    def close(self) -> None:
        self.client.close()
        self.cache.close()


class Holder:
    """Makes an `Asked` once, for all threads, and forgets it on release."""

    def __init__(self) -> None:
        self.lock, self.asked = threading.Lock(), None

    def get(self, *args: Any) -> Asked:
        with self.lock:
            if self.asked is None:
                self.asked = Asked(*args)
            return self.asked

    def release(self) -> None:
        with self.lock:
            asked, self.asked = self.asked, None
        if asked is not None:
            asked.close()


def longest(seconds: float, server: Mapping[str, Any]) -> float:
    """Seconds of one call: its deadline, the question for the model's name, the time that a server of the run may take to be
    started anew, and some to say what went wrong: a worker that is ended at its deadline cannot."""
    started_here = str(server.get("url", "")).startswith(STARTED)
    named = 0.0 if server.get("model") else MODELS_S
    return seconds + named + (float(server.get("start_timeout_s", 0.0)) if started_here else 0.0) + TELLING_S


def reference_of(prompt: Prompt, field: str) -> str:
    """The text of a reference answer; empty if there is none."""
    value = prompt.answer.get(field)
    return "" if value is None else str(value).strip()


def failed(name: str, prompt: Prompt, error: object) -> VerifierFailed:
    return VerifierFailed(f"verifier {name}: {prompt.uid}: {error}")
