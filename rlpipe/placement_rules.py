"""What a configuration must not say about who sits where: roles that share GPUs, and workers that join later."""

from __future__ import annotations

from rlpipe.config import RunConfig
from rlpipe.errors import ConfigError

SHARING = ("rollout", "learner", "value")  # roles that can take turns on a GPU


def check_placement(cfg: RunConfig) -> None:
    """ConfigError, with the arithmetic and the remedy, for the first contradiction."""
    if cfg.rollout.min_workers > cfg.rollout.workers:
        raise ConfigError(
            f"rollout.min_workers={cfg.rollout.min_workers} is more than rollout.workers={cfg.rollout.workers}; the run starts "
            "with the first and grows to the second, so lower it, or leave it 0 to start with all"
        )
    if cfg.learner.gpus > 1:
        raise ConfigError(
            f"learner.gpus={cfg.learner.gpus:g}: a rank uses one GPU; for the same {cfg.learner.workers} × "
            f"{cfg.learner.gpus:g} GPUs set learner.gpus=1 and learner.workers={round(cfg.learner.workers * cfg.learner.gpus)}"
        )
    if cfg.cluster.colocate:
        _check_sharing(cfg)


def _check_sharing(cfg: RunConfig) -> None:
    names = list(cfg.cluster.colocate)
    said = f"cluster.colocate=[{', '.join(names)}]"
    unknown = [name for name in names if name not in SHARING]
    if unknown or len(set(names)) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"{said}: name at least two different ones of {', '.join(SHARING)}, e.g. [rollout, learner]")
    if "value" in names and not cfg.value.enabled:
        raise ConfigError(f"{said}: there is no value model; set value.enabled=true, or leave value out")
    if "rollout" not in names:
        raise ConfigError(f"{said}: policy and value model are trained at the same time; rollout takes turns with them")
    ranks, learner = cfg.learner.workers, cfg.learner
    if cfg.rollout.workers != ranks:
        raise ConfigError(
            f"{said}: the i-th worker of each role shares a GPU, but rollout.workers={cfg.rollout.workers} and "
            f"learner.workers={ranks}; make them equal"
        )
    if cfg.rollout.gpus != learner.gpus:
        raise ConfigError(
            f"{said}: they share GPUs, but rollout.gpus={cfg.rollout.gpus:g} and learner.gpus={learner.gpus:g}; make them "
            "equal (each role has all of the GPU in its turn)"
        )
    if cfg.mode != "sync":
        raise ConfigError(f"{said}: who takes turns cannot overlap, and mode={cfg.mode} overlaps; use mode=sync")
    if cfg.rollout.oversample > 1:
        raise ConfigError(
            f"{said}: rollout.oversample={cfg.rollout.oversample:g} leaves responses under way while the learner has the GPU; "
            "use 1"
        )
    if 0 < cfg.rollout.min_workers < cfg.rollout.workers:
        raise ConfigError(
            f"{said}: rollout.min_workers={cfg.rollout.min_workers} of {cfg.rollout.workers} sit beside learner ranks, and "
            "these all start at once; leave it 0"
        )
