"""What a configuration must not say about rollout and update that overlap."""

from __future__ import annotations

from rlpipe.config import RunConfig
from rlpipe.errors import ConfigError


def check_overlap(cfg: RunConfig) -> list[str]:
    """Warnings, or ConfigError for the first contradiction, with the remedy."""
    rollout, lagging = cfg.rollout, cfg.mode == "async" and cfg.max_lag > 0
    if rollout.oversample < 1:
        raise ConfigError(
            f"rollout.oversample={rollout.oversample:g}: so many groups are begun for each that a step trains on; at least 1"
        )
    if rollout.order == "freshest" and not lagging:
        raise ConfigError(
            f"rollout.order=freshest: with mode={cfg.mode}, max_lag={cfg.max_lag} all groups of a step have the same weights; "
            "use mode=async max_lag=1, or leave rollout.order=in_order"
        )
    found = []
    if rollout.oversample > 1:
        found.append(
            f"rollout.oversample={rollout.oversample:g}: a step takes the groups that are done first, so prompts with short "
            "responses come earlier in training, and the same seed no longer gives the same run"
        )
    if lagging and not rollout.partial and rollout.transport in ("broadcast", "shared"):
        found.append(
            f"rollout.transport={rollout.transport} needs all workers at one moment, and with rollout.partial=false they take "
            "weights one after the other: weights go through the object store"
        )
    return found
