"""The workers of a run: ranks of policy and value model, rollout workers, verifiers, and the way of weights between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.cluster import Placement
from rlpipe.config import RunConfig
from rlpipe.learner.group import LearnerGroup, RankGroup, ValueGroup
from rlpipe.rollout.pool import RolloutPool
from rlpipe.serving.server import Servers
from rlpipe.turns import Turns
from rlpipe.verifiers.pool import VerifierPool
from rlpipe.verifiers.served import with_server
from rlpipe.weight_sync import WeightSync

USAGE_S = 20.0  # for an answer to what a worker uses


@dataclass(slots=True)
class Crew:
    """value: None without a value model. servers: of language models that the run started itself."""

    learner: LearnerGroup
    value: ValueGroup | None
    rollouts: RolloutPool
    verifiers: VerifierPool
    sync: WeightSync
    servers: Servers | None = None

    @classmethod
    def start(
        cls,
        cfg: RunConfig,
        run_dir: Path,
        model_folder: str,
        verifier: str,
        placement: Placement,
        spans: Callable[..., None],
    ) -> Crew:
        """verifier: the task's own. spans(track, name, start, end, ok=…): told what each worker did."""
        servers = Servers(cfg, run_dir, placement.options)  # they load while the learner does
        cfg = servers.settled()
        judging = with_server(cfg.verifier, cfg.judge, str(Path(cfg.output_dir).absolute() / "cache" / "judge"))
        learner = LearnerGroup(cfg, model_folder, placement)
        value = ValueGroup(cfg, model_folder, placement) if cfg.value.enabled else None
        servers.wait()
        Turns(cfg, [learner] if value is None else [learner, value]).before_rollouts_start()
        partial = cfg.mode == "async" and cfg.max_lag > 0 and cfg.rollout.partial
        rollouts = RolloutPool(cfg, model_folder, placement, spans=_on_tracks("rollout", spans), at_once=partial)
        verifiers = VerifierPool(
            judging, verifier, placement, cfg.cluster.start_timeout_s, spans=_on_tracks("verifier", spans)
        )
        return cls(learner, value, rollouts, verifiers, WeightSync(cfg, learner, rollouts), servers)

    @property
    def trained(self) -> list[RankGroup]:
        """The models that learn."""
        return [self.learner] if self.value is None else [self.learner, self.value]

    def usage(self) -> dict[str, list[dict[str, Any]]]:
        """What every worker that answers uses of memory, by role; see `rlpipe.usage`."""
        replies = {group.role: group.usage() for group in self.trained}
        for role, pool in (("rollout", self.rollouts.pool), ("verifier", self.verifiers.pool)):
            replies[role] = list(pool.each("usage", timeout_s=USAGE_S, what="memory in use").values())
        return replies

    def close(self) -> None:
        """End the workers; safe after any failure."""
        self.sync.forget()
        self.rollouts.close()
        self.verifiers.close()
        for group in self.trained:
            group.close()
        if self.servers is not None:
            self.servers.close()


def _on_tracks(role: str, spans: Callable[..., None]) -> Callable[[int, str, float, float, bool], None]:
    return lambda index, name, start, end, ok: spans(f"{role} {index}", name, start, end, ok=ok)
