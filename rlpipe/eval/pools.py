"""The workers of an evaluation: rollout workers that keep the weights of the model's folder, and verifiers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlpipe import cluster
from rlpipe.cluster import Role
from rlpipe.config import RunConfig
from rlpipe.eval.settings import EvaluationConfig
from rlpipe.rollout.pool import RolloutPool
from rlpipe.server_settings import wanted
from rlpipe.serving.server import Servers
from rlpipe.verifiers.pool import VerifierPool
from rlpipe.verifiers.served import with_server

log = logging.getLogger("rlpipe")

OUTPUTS = "outputs"  # of evaluations


@contextmanager
def workers(
    cfg: EvaluationConfig | RunConfig, model_folder: str, verifier: str, run_dir: Path | None = None
) -> Iterator[tuple[RolloutPool, VerifierPool]]:
    """Connect to Ray, start both pools, and end everything that was started. Rollout workers keep the weights that they load
    themselves, restarted ones too: nothing is sent to them. run_dir: for logs of servers; None: where the results of a run
    would go. Raises ClusterError and what workers raise."""
    home = Path(cfg.output_dir if isinstance(cfg, RunConfig) else OUTPUTS)
    roles = [
        Role("rollout", cfg.rollout.workers, cfg.rollout.cpus, cfg.rollout.gpus),
        Role("verifier", cfg.verifier.workers, cfg.verifier.cpus),
        *(Role(name, 1, server.cpus, server.gpus) for name, server in wanted(cfg).items()),
    ]
    placement = rollouts = verifiers = servers = None
    need = {kind: sum(role.workers * getattr(role, kind) for role in roles) for kind in ("cpus", "gpus")}
    cluster.connect(cfg.cluster, need_cpus=need["cpus"], need_gpus=need["gpus"])
    try:
        cluster.preflight(roles)
        placement = cluster.place(roles, cfg.cluster.start_timeout_s)
        servers = Servers(cfg, run_dir or home, placement.options)
        servers.wait()
        settled = servers.settled()
        rollouts = RolloutPool(settled, model_folder, placement)
        judging = with_server(settled.verifier, settled.judge, str(home.absolute() / "cache" / "judge"))
        verifiers = VerifierPool(judging, verifier, placement, cfg.cluster.start_timeout_s)
        yield rollouts, verifiers
    finally:
        for part in (rollouts, verifiers, servers):
            if part is not None:
                part.close()
        if placement is not None:
            placement.remove()
        cluster.disconnect()
