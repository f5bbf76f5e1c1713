"""Servers that a run starts for itself: an actor around each engine, and those that the recipe asks for, by role."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlpipe.cluster import fetch, finished
from rlpipe.config import RunConfig, ServerConfig
from rlpipe.errors import ClusterError, ServerError
from rlpipe.server_settings import STARTED, wanted
from rlpipe.serving.address import find
from rlpipe.serving.connection import Address
from rlpipe.serving.engine import PYTHON_ENV, Engine, command, free_address

log = logging.getLogger("rlpipe")

RESTARTS = 3  # of one server, by Ray, wherever there is room for it
WATCH_S = 0.5
HEALTH_EVERY_S, SICK_S = 10.0, 120.0  # an engine that has answered, and then does not for so long, is taken down


class VllmServer:
    """Waits for: nothing; it starts its engine at once. Consumes: nothing, its clients speak to the engine. Produces: the
    address, as soon as the engine answers.

    An engine that ends, or no longer answers for SICK_S, after it has once answered takes this process down with it, so that
    Ray starts the actor anew, on another node if need be. One that never came up is a wrong setting: `address` says so with
    the end of its log, and nothing is restarted. The engine ends with this process, however that ends.
    """

    def __init__(self, cfg: ServerConfig, role: str, log_file: str, python: str = ""):
        import ray

        self.role, self.answered, self.engine = role, False, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own property warns about what it uses itself
            self.restarted = ray.get_runtime_context().was_current_actor_reconstructed
        place = free_address(ray.util.get_node_ip_address())
        try:
            self.engine = Engine(command(cfg, *place.host_and_port(), python), place, Path(log_file))
        except (ServerError, OSError) as error:  # told to who asks for the address: restarting would not help
            self.failed = f"the {role}'s server cannot be started on this node: {error}"
            return
        self.well = time.monotonic()  # when it last answered
        threading.Thread(target=self._watch, name="watches the engine", daemon=True).start()

    def pid(self) -> int:
        return os.getpid()

    def alive(self) -> bool:
        return self.engine is not None and self.engine.code() is None

    def address(self) -> Address | None:
        """None until it answers. Raises ServerError, with the end of the log, if the engine could not be started."""
        if self.engine is None:
            raise ServerError(self.failed)
        if self.engine.code() is not None and not self.answered:
            raise ServerError(
                f"the engine of the {self.role}'s server ended with code {self.engine.code()} before it answered; log "
                f"{self.engine.log_file}, which ends:\n{self.engine.tail()}"
            )
        return self.engine.address if self.answered else None

    def _watch(self) -> None:
        checked = 0.0
        while True:
            time.sleep(WATCH_S)
            now = time.monotonic()
            if self.engine.code() is not None:
                if self.answered or self.restarted:
                    _end(f"the engine of the {self.role}'s server ended with code {self.engine.code()}", self.engine)
                return
            if now - checked >= (HEALTH_EVERY_S if self.answered else 1.0):
                checked = now
                if self.engine.healthy():
                    if not self.answered:
                        print(f"the {self.role}'s server answers after {now - self.engine.started:.0f} s", flush=True)
                    self.answered, self.well = True, time.monotonic()
            if self.answered and time.monotonic() - self.well > SICK_S:
                _end(f"the {self.role}'s server has not answered for {SICK_S:.0f} s", self.engine)


def _end(reason: str, engine: Engine) -> None:
    """Ray sees a dead actor, which it may restart; its name, and so its clients, stay."""
    print(f"{reason}; its actor ends too, to be started anew. Log: {engine.log_file}", flush=True)
    os._exit(1)


class Servers:
    """All servers that a recipe asks for, started in the places that `options(role, 0)` names; `wait` until they answer.

    options: of `Placement.options`. make: of the actor's class and its arguments besides, for tests. The servers are restarted
    by Ray, RESTARTS times each; `config` is the recipe's, with the url under which clients find them through that.
    """

    def __init__(
        self, cfg: RunConfig, run_dir: Path, options: Callable[[str, int], Mapping[str, Any]], server: type = VllmServer
    ):
        import ray

        self.cfg, self.restarts = cfg, dict.fromkeys(wanted(cfg), 0)
        self.actors: dict[str, tuple[str, Any]] = {}
        self._pids: dict[str, tuple[Any, int]] = {}  # (question under way, last answer)
        python = os.environ.get(PYTHON_ENV, "")
        for role, section in wanted(cfg).items():
            name = f"rlpipe-{role}-{run_dir.name}-{os.getpid()}"
            log_file = str(run_dir.absolute() / "servers" / f"{role}.log")
            settings = dict(options(role, 0)) | {"name": name, "max_restarts": RESTARTS}
            self.actors[role] = name, ray.remote(server).options(**settings).remote(section, role, log_file, python)
            log.info("%s: starting a server for %s; its log is %s", role, section.model, log_file)

    def wait(self) -> None:
        """Until all answer. Raises ServerError with the end of the log of one that cannot start."""
        for role, (name, _) in self.actors.items():
            started, section = time.monotonic(), getattr(self.cfg, role)
            address = find(name, f"the {role}'s server", section.start_timeout_s)
            log.info("%s: the server answers at %s after %.0f s", role, address.root, time.monotonic() - started)

    def metrics(self) -> dict[str, float]:
        """For a step's log: how often each has been started anew, as far as is known now. Waits for nothing."""
        for role, (_, actor) in self.actors.items():
            question, last = self._pids.get(role, (None, 0))
            if question is not None and finished([question], 0.0):
                try:
                    pid = fetch(question, f"the {role}'s server")
                    self.restarts[role] += last not in (0, pid)
                    question, last = None, pid
                except ClusterError:  # between two lives
                    question = None
            self._pids[role] = (question or actor.pid.remote(), last)
        return {f"cluster/{role}_restarts": float(count) for role, count in self.restarts.items()}

    def config(self, role: str) -> ServerConfig:
        """The section of a role for its clients, wherever they are: picklable, and right through restarts."""
        section = getattr(self.cfg, role)
        if role not in self.actors:
            return section
        return dataclasses.replace(section, url=f"{STARTED}{self.actors[role][0]}", key_env="")

    def settled(self) -> RunConfig:
        """The recipe with `config` in place of each section: what workers that ask a server are given."""
        return dataclasses.replace(self.cfg, **{role: self.config(role) for role in self.actors})

    def close(self) -> None:
        """Ends them all, engines included."""
        import ray

        for _, actor in self.actors.values():
            ray.kill(actor)
        self.actors = {}
