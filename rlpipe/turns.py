"""Whose turn it is on GPUs that rollout workers and learner ranks share: the others keep what they have in host memory."""

from __future__ import annotations

from rlpipe.config import RunConfig
from rlpipe.learner.group import RankGroup
from rlpipe.rollout.pool import RolloutPool


class Turns:
    """groups: policy and value model. Without `cluster.colocate` nobody shares, and all of this does nothing.

    A run starts with the learner's turn. A step is: rollouts' turn, `to_learner`, updates, `send`, weights to the rollout
    workers, `to_rollouts`.
    """

    def __init__(self, cfg: RunConfig, groups: list[RankGroup], rollouts: RolloutPool | None = None):
        self.shared = bool(cfg.cluster.colocate)
        self.groups = [group for group in groups if group.role in cfg.cluster.colocate]
        self.rollouts = rollouts

    def before_rollouts_start(self) -> None:
        """Their workers load a model each, for which there must be room."""
        for group in self.groups:
            group.sleep()

    def to_learner(self) -> None:
        """Rollout workers let go of weights and cache, and are asked for nothing until new weights wake them."""
        if self.shared:
            self.rollouts.sleep()
            for group in self.groups:
                group.wake()

    def send(self) -> None:
        """All but the policy's weights leaves the GPU, so that these can be sent to workers that wake up for them."""
        for group in self.groups:
            group.sleep(keep_weights=group.role == "learner")

    def to_rollouts(self) -> None:
        for group in self.groups:
            group.sleep()
