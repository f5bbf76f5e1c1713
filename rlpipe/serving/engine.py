"""One engine of vLLM as a process: its command line, its log, whether it answers, and that it ends with its owner."""

from __future__ import annotations

import http.client
import importlib.util
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpipe.config import ServerConfig
from rlpipe.errors import ServerError
from rlpipe.serving import leash
from rlpipe.serving.connection import Address

log = logging.getLogger("rlpipe")

PYTHON_ENV = "RLPIPE_VLLM_PYTHON"  # the Python of an environment that has vLLM, if this one has not
MODULE = "vllm.entrypoints.openai.api_server"  # what `vllm serve` runs; the script is missing from some builds
TAIL_BYTES = 4000
HEALTH_S = 5.0
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1"}


def command(cfg: ServerConfig, host: str, port: int, python: str = "") -> list[str]:
    """The server's command line for cfg.model. cfg.args are flags of `vllm serve`: true for one without a value, false or null
    to leave it out, lists for several values, mappings as JSON; they win over ours: as many GPUs as Ray gave, no sampling
    defaults out of the model's folder, and no line of the log for every request. Raises ServerError if vLLM is not here."""
    python = python or os.environ.get(PYTHON_ENV, "")
    if not python and importlib.util.find_spec("vllm") is None:
        raise ServerError(
            f"a server for {cfg.model} needs vLLM, which is not installed here: pip install rlpipe[vllm], or set {PYTHON_ENV} "
            "to the python of an environment that has it; or give the url of a server that is there"
        )
    own: dict[str, Any] = {"generation-config": "vllm", "disable-uvicorn-access-log": True}
    if cfg.gpus > 1:
        own["tensor-parallel-size"] = int(cfg.gpus)
    own |= {str(name).lstrip("-").replace("_", "-"): value for name, value in cfg.args.items()}
    fixed = ["--model", cfg.model, "--host", host, "--port", str(port)]
    return [python or sys.executable, "-m", MODULE, *fixed, *flags(own)]


def flags(args: Mapping[str, Any]) -> list[str]:
    """Example: `flags({"max-model-len": 4096, "enforce-eager": True})` → `["--max-model-len", "4096", "--enforce-eager"]`."""
    words: list[str] = []
    for name, value in args.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif value is not True:
            words += [str(part) for part in value] if isinstance(value, (list, tuple)) else [str(value)]
    return words


class Engine:
    """A started process. address: of its server, with a key made for it, so that nobody else's requests count as ours."""

    def __init__(self, words: Sequence[str], address: Address, log_file: Path):
        self.address, self.log_file = address, log_file
        self.started = time.monotonic()
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as output:
            output.write(f"\n--- {time.strftime('%F %T')} {' '.join(words)}\n".encode())
            output.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(leash.__file__), *words],
                stdin=subprocess.PIPE,  # the leash: it is closed when this process ends
                stdout=output,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | os.environ | {"VLLM_API_KEY": address.key},
            )

    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    def healthy(self) -> bool:
        """Whether the server answers that it is well."""
        connection = http.client.HTTPConnection(*self.address.host_and_port(), timeout=HEALTH_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def tail(self) -> str:
        """The last lines of its log."""
        with self.log_file.open("rb") as file:
            file.seek(max(0, self.log_file.stat().st_size - TAIL_BYTES))
            return file.read().decode("utf8", "replace").strip()

    def stop(self) -> None:
        """Ends the process and all it has started; harmless when repeated."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.stdin.close()
        self.process.wait(HEALTH_S)


def free_address(host: str) -> Address:
    """A port that is free now, and a fresh key."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return Address(f"http://{f'[{host}]' if ':' in host else host}:{port}", secrets.token_urlsafe(16))
