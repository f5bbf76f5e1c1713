"""Which servers of language models a recipe speaks to, which of them a run starts, and what it must not say about them."""

from __future__ import annotations

from rlpipe.config import RunConfig, ServerConfig
from rlpipe.errors import ConfigError

ROLES = ("judge", "guide")  # sections of a recipe
ASKING = ("llm_judge", "reward_model")  # verifiers that ask the judge
SCHEMES = ("http://", "https://")
STARTED = "ray:"  # of the URL of a server that the run has started: ray:NAME of its actor, which says where it is


def wanted(cfg: RunConfig) -> dict[str, ServerConfig]:
    """Role → section, of the servers that a run has to start: those with a model and no url."""
    sections = {role: getattr(cfg, role) for role in ROLES}
    return {role: section for role, section in sections.items() if section.model and not section.url}


def check_servers(cfg: RunConfig) -> None:
    """Raises ConfigError for a verifier that asks a judge where there is none, and for addresses and shares that cannot be."""
    for name in (cfg.verifier.name, *cfg.verifier.parts):
        if name in ASKING and not (cfg.judge.url or cfg.judge.model):
            raise ConfigError(
                f"verifier {name} asks a server, and there is none: judge.url=http://HOST:PORT/v1 for one that is there, or "
                "judge.model=FOLDER to start one with the run"
            )
    for role in ROLES:
        server = getattr(cfg, role)
        if server.url and not server.url.startswith((*SCHEMES, STARTED)):
            raise ConfigError(f"{role}.url={server.url}: an address such as http://HOST:8000/v1")
        if server.url and server.args:
            raise ConfigError(f"{role}.args are of a server that the run starts itself, and {role}.url names one that is there")
        if server.gpus > 1 and server.gpus != int(server.gpus):
            raise ConfigError(f"{role}.gpus={server.gpus:g}: whole GPUs, or a share of one")
