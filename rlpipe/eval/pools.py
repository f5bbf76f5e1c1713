"""The workers of an evaluation: rollout workers that keep the weights of the model's folder, and verifiers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rlpipe import cluster
from rlpipe.cluster import Role
from rlpipe.eval.settings import EvaluationConfig
from rlpipe.models.weights import Manifest
from rlpipe.rollout.pool import RolloutPool, WeightUpdate
from rlpipe.verifiers.pool import VerifierPool

log = logging.getLogger("rlpipe")

AS_LOADED = Manifest(version=-1, entries=(), checksum="")  # the version of a worker before its first weight update


class FolderRollouts(RolloutPool):
    """A rollout pool under the weights that its workers load themselves, restarted ones too: nothing is sent to them."""

    def __init__(self, cfg: EvaluationConfig, model_folder: str, placement: cluster.Placement):
        super().__init__(cfg, model_folder, placement)
        self.current = WeightUpdate(AS_LOADED, ())

    def _push(self, worker) -> None:
        """A new worker has read the folder already."""


@contextmanager
def workers(cfg: EvaluationConfig, model_folder: str, verifier: str) -> Iterator[tuple[RolloutPool, VerifierPool]]:
    """Connect to Ray, start both pools, and end everything that was started. Raises ClusterError and what workers raise."""
    roles = [
        Role("rollout", cfg.rollout.workers, cfg.rollout.cpus, cfg.rollout.gpus),
        Role("verifier", cfg.verifier.workers, cfg.verifier.cpus),
    ]
    placement = rollouts = verifiers = None
    need = {kind: sum(role.workers * getattr(role, kind) for role in roles) for kind in ("cpus", "gpus")}
    cluster.connect(cfg.cluster, need_cpus=need["cpus"], need_gpus=need["gpus"])
    try:
        cluster.preflight(roles)
        placement = cluster.place(roles, cfg.cluster.start_timeout_s)
        rollouts = FolderRollouts(cfg, model_folder, placement)
        verifiers = VerifierPool(cfg.verifier, verifier, placement, cfg.cluster.start_timeout_s)
        yield rollouts, verifiers
    finally:
        for part in (rollouts, verifiers):
            if part is not None:
                part.close()
        if placement is not None:
            placement.remove()
        cluster.disconnect()
