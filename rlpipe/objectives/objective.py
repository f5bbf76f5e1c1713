"""An objective is five small choices: row planner, ratio unit, advantage, loss, reducer. A preset names them.

Adding a method means one entry in `PRESETS` and at most one new function of the kind that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from rlpipe.config import AlgoConfig
from rlpipe.errors import ConfigError
from rlpipe.objectives.advantages import ADVANTAGES, group_advantages
from rlpipe.objectives.estimators import AllMasked, LeftToRight, SampledSteps, Segments
from rlpipe.objectives.losses import KL_ESTIMATORS, RatioUnit, importance_weight, kl_penalty, policy_loss, token_log_ratio
from rlpipe.objectives.planner import Planner, RandomMask, Replay
from rlpipe.objectives.reducers import KL_NORMALIZERS, NORMALIZERS, token_weights
from rlpipe.objectives.rows import Rows
from rlpipe.objectives.statistics import LossTerms, finalize, finalize_updates, importance_sums, ratio_sums
from rlpipe.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The five choices of a method; the recipe's `algo` section supplies their numbers.

    planner: the class of its row planner; algo.shrink and algo.options fill its fields · ratio_unit: see `token_log_ratio` ·
    advantage: see `group_advantages` · policy_loss: see `losses.policy_loss` · reducer: see `token_weights`.
    """

    planner: type[Planner]
    ratio_unit: RatioUnit = token_log_ratio
    advantage: Callable[[np.ndarray, str], np.ndarray] = group_advantages
    policy_loss: Callable[..., tuple[torch.Tensor, torch.Tensor]] = policy_loss
    reducer: Callable[..., list[np.ndarray]] = token_weights

    def make_planner(self, algo: AlgoConfig) -> Planner:
        """Raises ConfigError for a number that the planner does not have, with the nearest one."""
        known = [field.name for field in fields(self.planner)]
        for name in algo.options:
            if name not in known or name == "shrink":
                near = get_close_matches(name, [k for k in known if k != "shrink"], 1, 0.0)
                hint = f"; did you mean {near[0]}?" if near else ", it has none"
                raise ConfigError(f"algo.options.{name}: the rows of preset {algo.preset} have no such number{hint}")
        if algo.shrink < 1 or (algo.shrink != 1 and "shrink" not in known):
            wanted = "must be at least 1" if "shrink" in known else f"preset {algo.preset} merges no steps; leave it 1"
            raise ConfigError(f"algo.shrink={algo.shrink}: {wanted}")
        return self.planner(**({"shrink": algo.shrink} if "shrink" in known else {}), **algo.options)


PRESETS: dict[str, Preset] = {
    "tracerl": Preset(planner=Replay),
    "random_mask": Preset(planner=RandomMask),
    "dipo": Preset(planner=Replay),
    "cj_grpo": Preset(planner=Replay),
    "d2_stepmerge": Preset(planner=Segments),
    "agrpo": Preset(planner=SampledSteps),
    "just_grpo": Preset(planner=LeftToRight),
    "diffu_grpo": Preset(planner=AllMasked),
}


@dataclass(frozen=True, slots=True)
class Objective:
    """A preset with a recipe's numbers; holds no state. max_tokens: response budget, for reducer `constant` only."""

    preset: Preset
    algo: AlgoConfig
    planner: Planner
    max_tokens: int | None = None

    @property
    def replays_rollout(self) -> bool:
        """The rows show exactly the states that the sampler saw."""
        return self.planner.replays_rollout

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        """Rows of one trajectory. Old, reference and new log-probabilities must be scored on the same rows."""
        return self.planner.plan(trajectory, rng)

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """rewards float[G] of one group → float32[G]."""
        return self.preset.advantage(rewards, self.algo.advantage)

    def weights(self, rows: Sequence[Rows], response_lens: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(policy, KL) weights of all scored tokens of one update: rows and canvas lengths of all its responses."""
        policy, kl = (
            self.preset.reducer(rows, normalizer=name, response_lens=response_lens, max_tokens=self.max_tokens)
            for name in (self.algo.normalizer, self.algo.kl_normalizer or self.algo.normalizer)
        )
        return policy, kl

    def loss(
        self,
        logp: torch.Tensor,
        old_logp: torch.Tensor,
        advantage: torch.Tensor,
        policy_weight: torch.Tensor,
        kl_weight: torch.Tensor,
        entropy: torch.Tensor | None = None,
        behaviour_logp: torch.Tensor | None = None,
    ) -> LossTerms:
        """Σ policy_weight · policy loss + kl_coef · Σ kl_weight · KL, over any part of an update's scored tokens [T].

        logp carries the gradient; old_logp is both the ratio's denominator and the KL's reference: the policy that
        opened the step. entropy: nats, only reported. behaviour_logp: of the sampler where it was another distribution, NaN
        elsewhere; see `importance_weight`.
        """
        algo, old_logp = self.algo, old_logp.detach()
        per_token, ratio = self.preset.policy_loss(
            logp, old_logp, advantage, algo.clip_low, algo.clip_high, ratio_unit=self.preset.ratio_unit
        )
        if behaviour_logp is not None:
            weight = importance_weight(old_logp, behaviour_logp, algo.importance_cap)
            per_token = per_token * weight
        policy = (policy_weight * per_token).sum()
        kl = torch.zeros_like(policy)
        if algo.kl_coef:
            kl = algo.kl_coef * (kl_weight * kl_penalty(logp, old_logp, algo.kl_estimator)).sum()
        loss = policy + kl
        sums = ratio_sums(ratio, logp, old_logp, advantage, algo.clip_low, algo.clip_high)
        sums |= {"loss": loss.detach(), "policy_loss": policy.detach(), "kl_loss": kl.detach()}
        if behaviour_logp is not None and not behaviour_logp.isnan().all():
            sums |= importance_sums(weight, behaviour_logp, algo.importance_cap)
        if entropy is not None:
            sums["entropy"] = entropy.detach().float().sum()
        return LossTerms(loss, sums)

    def finalize(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """algo/ metrics of one update from its sums over micro-batches and ranks; see `statistics.finalize`."""
        return finalize(sums)

    def finalize_updates(self, updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """algo/ metrics of one step; see `statistics.finalize_updates`."""
        return finalize_updates(updates)


def build_objective(algo: AlgoConfig, max_tokens: int | None = None) -> Objective:
    """The objective that a recipe names. max_tokens: rollout.decoder.max_tokens, needed where `weights` is called
    with the normalizer `constant`. Raises ConfigError, with the nearest match for a wrong name."""
    _known("preset", algo.preset, tuple(PRESETS))
    _known("advantage", algo.advantage, ADVANTAGES)
    _known("kl_estimator", algo.kl_estimator, KL_ESTIMATORS)
    _known("normalizer", algo.normalizer, NORMALIZERS)
    if algo.kl_normalizer:
        _known("kl_normalizer", algo.kl_normalizer, KL_NORMALIZERS)
    preset = PRESETS[algo.preset]
    for name in ("clip_low", "clip_high", "kl_coef"):
        if not getattr(algo, name) >= 0:
            raise ConfigError(f"algo.{name}={getattr(algo, name)}: must not be negative")
    return Objective(preset, algo, preset.make_planner(algo), max_tokens)


def _known(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        nearest = get_close_matches(value, choices, 1, 0.0)[0]
        raise ConfigError(f"algo.{key}={value}: known are {', '.join(choices)}; did you mean {nearest}?")
