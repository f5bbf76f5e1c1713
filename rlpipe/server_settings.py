"""Which servers of language models a recipe speaks to, which of them a run starts, and what it must not say about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rlpipe.config import RunConfig, ServerConfig
from rlpipe.errors import ConfigError

ROLES = ("judge", "guide")  # sections of a recipe
ASKING = ("llm_judge", "reward_model")  # verifiers that ask the judge
SCHEMES = ("http://", "https://")
STARTED = "ray:"  # of the URL of a server that the run has started: ray:NAME of its actor, which says where it is

Config = TypeVar("Config")  # of a run or an evaluation


def wanted(cfg: RunConfig) -> dict[str, ServerConfig]:
    """Role → section, of the servers that a run has to start: those with a model and no url."""
    sections = {role: getattr(cfg, role) for role in ROLES}
    return {role: section for role, section in sections.items() if section.model and not section.url}


def with_servers_asked(cfg: Config, verifiers: Iterable[str], guided: Sequence[str]) -> Config:
    """The configuration without the servers that nobody would ask: a run's are not started for an evaluation without need.
    verifiers: that may judge · guided: names of decoders with select: guided. Raises ConfigError for one that is missing."""
    asking = sorted({*ASKING} & {*verifiers})
    _check_judge(cfg, asking)
    if guided and not (cfg.guide.url or cfg.guide.model):
        raise ConfigError(
            f"decoder {guided[0]} has select=guided, and no guide reads its drafts; set guide.url=http://HOST:8000/v1 of a "
            "server that is there, or guide.model=FOLDER to start one"
        )
    idle = {"judge": not asking, "guide": not guided}
    return dataclasses.replace(cfg, **{role: ServerConfig() for role in ROLES if idle[role]})


def identity_of(server: ServerConfig) -> dict[str, Any]:
    """What its answers depend on, as far as a recipe says it: where a named model is served does not count."""
    return {"model": server.model, "args": server.args} if server.model else {"url": server.url}


def check_servers(cfg: RunConfig) -> None:
    """Raises ConfigError for a verifier that asks a judge where there is none, and for addresses and shares that cannot be.
    cfg: of a run, or what has its sections."""
    own = [str(part.get("verifier", "")) for part in cfg.data.mixture]
    _check_judge(cfg, [name for name in (cfg.verifier.name, *cfg.verifier.parts, *own) if name in ASKING])
    for role in ROLES:
        server = getattr(cfg, role)
        if server.url and not server.url.startswith((*SCHEMES, STARTED)):
            raise ConfigError(f"{role}.url={server.url}: an address such as http://HOST:8000/v1")
        if server.url and server.args:
            raise ConfigError(f"{role}.args are of a server that the run starts itself, and {role}.url names one that is there")
        if server.gpus > 1 and server.gpus != int(server.gpus):
            raise ConfigError(f"{role}.gpus={server.gpus:g}: whole GPUs, or a share of one")


def _check_judge(cfg: Any, asking: Sequence[str]) -> None:
    if asking and not (cfg.judge.url or cfg.judge.model):
        raise ConfigError(
            f"verifier {asking[0]} asks a server, and there is none: judge.url=http://HOST:PORT/v1 for one that is there, or "
            "judge.model=FOLDER to start one with the run"
        )
