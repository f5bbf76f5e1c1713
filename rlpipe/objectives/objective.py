"""An objective is five small choices: row planner, ratio unit, advantage, loss, reducer. A preset and a recipe name them.

Adding a method means one entry in `PRESETS`, its numbers in `rlpipe.objective_presets`, and at most one new function of the
kind that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from rlpipe import user_code
from rlpipe.config import AlgoConfig
from rlpipe.errors import ConfigError
from rlpipe.objectives.advantages import ADVANTAGES, group_advantages
from rlpipe.objectives.bounds import Sandwich
from rlpipe.objectives.entries import Entries
from rlpipe.objectives.estimators import AllMasked, LeftToRight, SampledSteps, Segments
from rlpipe.objectives.losses import KL_ESTIMATORS, Certainty, Clip, importance_weight, kl_penalty, likelihood_loss, policy_loss
from rlpipe.objectives.masking import BlockMasks, ComplementaryMasks, CoupledMasks, select_scored
from rlpipe.objectives.planner import Planner, RandomMask, Replay, counted_tokens, response_blocks
from rlpipe.objectives.reducers import KL_NORMALIZERS, NORMALIZERS, unit_weights
from rlpipe.objectives.rows import Rows
from rlpipe.objectives.statistics import LossTerms, finalize, finalize_updates, importance_sums, ratio_sums
from rlpipe.objectives.step_credit import ChosenSteps
from rlpipe.objectives.units import UNITS, Units, join
from rlpipe.trajectory import Trajectory

KL_REFERENCES = ("old", "initial", "lagged")
SCORE_BY = ("confidence", "forced")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The choices of a method that are code; the recipe's `algo` section supplies the others and all numbers.

    planner: the class of its row planner; algo.shrink and algo.options fill its fields · loss: see `losses.policy_loss` ·
    bound: the class of a join that is not a sum, for the loss alone (its fields are filled from algo.options too); None: units
    are sums · certainty: the class of a term on the entropy of what is already right, filled likewise; None: there is none.
    """

    planner: type[Planner]
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Clip], torch.Tensor] = policy_loss
    bound: type[Sandwich] | None = None
    certainty: type[Certainty] | None = None

    def make(self, algo: AlgoConfig) -> tuple[Planner, Sandwich | None, Certainty | None]:
        """The planner, the bound and the certainty. Raises ConfigError for a number that none has, with the nearest one."""
        known = [field.name for field in fields(self.planner)]
        extras = (self.bound, self.certainty)
        of_extras = [[field.name for field in fields(extra)] if extra else [] for extra in extras]
        allowed = [name for name in sum(of_extras, known) if name != "shrink"]
        for name in algo.options:
            if name not in allowed:
                near = get_close_matches(name, allowed, 1, 0.0)
                hint = f"; did you mean {near[0]}?" if near else ", it has none"
                raise ConfigError(f"algo.options.{name}: the rows of preset {algo.preset} have no such number{hint}")
        if algo.shrink < 1 or (algo.shrink != 1 and "shrink" not in known):
            wanted = "must be at least 1" if "shrink" in known else f"preset {algo.preset} merges no steps; leave it 1"
            raise ConfigError(f"algo.shrink={algo.shrink}: {wanted}")
        own = {name: value for name, value in algo.options.items() if name in known}
        planner = self.planner(**({"shrink": algo.shrink} if "shrink" in known else {}), **own)
        bound, certainty = (
            extra(**{name: value for name, value in algo.options.items() if name in names}) if extra else None
            for extra, names in zip(extras, of_extras, strict=True)
        )
        return planner, bound, certainty


PRESETS: dict[str, Preset] = {
    "tracerl": Preset(planner=Replay),
    "random_mask": Preset(planner=RandomMask),
    "dipo": Preset(planner=Replay),
    "cj_grpo": Preset(planner=Replay),
    "d2_stepmerge": Preset(planner=Segments),
    "agrpo": Preset(planner=SampledSteps),
    "just_grpo": Preset(planner=LeftToRight),
    "diffu_grpo": Preset(planner=AllMasked),
    "wd1": Preset(planner=AllMasked, loss=likelihood_loss),
    "coupled_grpo": Preset(planner=CoupledMasks),
    "espo": Preset(planner=ComplementaryMasks),
    "spg": Preset(planner=BlockMasks, loss=likelihood_loss, bound=Sandwich),
    "mdpo": Preset(planner=ChosenSteps),
}


@dataclass(frozen=True, slots=True)
class Objective:
    """A preset with a recipe's numbers; holds no state. max_tokens: response budget, for reducer `constant` only."""

    preset: Preset
    algo: AlgoConfig
    planner: Planner
    bound: Sandwich | None = None
    max_tokens: int | None = None
    certainty: Certainty | None = None

    @property
    def replays_rollout(self) -> bool:
        """All rows show exactly the states that the sampler saw."""
        return self.planner.replays_rollout and not self.algo.random_share

    @property
    def needs_step_rewards(self) -> bool:
        """Rows carry advantages of their own, made of rewards of every denoising step's prediction."""
        return getattr(self.planner, "needs_step_rewards", False)

    @property
    def needs_reference(self) -> bool:
        """`loss` wants the log-probabilities of a model other than the policy that opened the step."""
        return self.algo.kl_coef > 0 and self.algo.kl_reference != "old"

    def plan(self, trajectory: Trajectory, rng: np.random.Generator) -> Rows:
        """Rows of one trajectory. Old, reference and new log-probabilities must be scored on the same rows."""
        return self.plan_all([trajectory], rng)[0]

    def plan_all(self, trajectories: Sequence[Trajectory], rng: np.random.Generator) -> list[Rows]:
        """Rows of all responses of a step, in their order, from one sequence of random numbers.

        algo.random_share of them, drawn by chance, get a row of random masking instead of the planner's; of the scored tokens
        those remain that algo.score_share and score_by choose. Raises NoStepMap where a planner needs the step map of a
        trajectory that has none.
        """
        batch = getattr(self.planner, "plan_all", None)
        planned = batch(trajectories, rng) if batch else [None] * len(trajectories)
        for i, trajectory in enumerate(trajectories):
            if self.algo.random_share and rng.random() < self.algo.random_share:
                planned[i] = RandomMask().plan(trajectory, rng)
            elif batch is None:
                planned[i] = self.planner.plan(trajectory, rng)
        return [self._select(rows, trajectory) for rows, trajectory in zip(planned, trajectories, strict=True)]

    def _select(self, rows: Rows, trajectory: Trajectory) -> Rows:
        if self.algo.score_by == "confidence" and self.algo.score_share >= 1:
            return rows
        return select_scored(rows, trajectory, self.algo.score_share, self.algo.score_by)

    def units(self, rows: Rows, trajectory: Trajectory) -> Units:
        """How the scored entries of a response join into the units of algo.ratio."""
        return join(rows, self.algo.ratio, response_blocks(trajectory), int(counted_tokens(trajectory).sum()))

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """rewards float[G] of one group → float32[G]."""
        return group_advantages(rewards, self.algo.advantage)

    def weights(self, units: Sequence[Units], response_lens: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(policy, KL) weights float32[U] a response: of all units of one update, given with the canvas lengths of all its
        responses."""
        policy, kl = (
            unit_weights(units, normalizer=name, response_lens=response_lens, max_tokens=self.max_tokens)
            for name in (self.algo.normalizer, self.algo.kl_normalizer or self.algo.normalizer)
        )
        return policy, kl

    def loss(
        self,
        logp: torch.Tensor,
        old_logp: torch.Tensor,
        entries: Entries,
        *,
        ref_logp: torch.Tensor | None = None,
        behaviour_logp: torch.Tensor | None = None,
        entropy: torch.Tensor | None = None,
    ) -> LossTerms:
        """Σ policy_weight · policy loss + kl_coef · Σ kl_weight · KL, over the units of any part of an update's entries [M].

        logp carries the gradient; old_logp is the ratio's denominator: the policy that opened the step, and the KL's reference
        unless ref_logp is given. behaviour_logp: of the sampler where it was another distribution, NaN elsewhere: such entries
        count as the policy's own, see `Entries.log_importance` and `importance_weight`. entropy: nats, only reported; where the
        preset forces certainty, that of the right tokens, 0 elsewhere, which then joins the loss. Raises ValueError if a
        reference is needed and not given.
        """
        if self.needs_reference and ref_logp is None:
            raise ValueError(f"algo.kl_reference={self.algo.kl_reference}: the loss needs the reference's log-probabilities")
        algo, clip = self.algo, self._clip()
        unit, old = entries.join(logp), entries.join(old_logp.detach())
        value = unit if self.bound is None else self.bound.join(logp, entries)
        per_unit = self.preset.loss(value, old, entries.advantage, clip)
        sums = ratio_sums(unit.detach(), old, entries.advantage, clip if self.preset.loss is policy_loss else None)
        if behaviour_logp is not None:
            log_ratio = entries.log_importance(old_logp.detach(), behaviour_logp)
            per_unit = per_unit * importance_weight(log_ratio, algo.importance_cap)
            if not log_ratio.isnan().all():
                sums |= importance_sums(log_ratio, algo.importance_cap)
        policy = (entries.policy_weight * per_unit).sum()
        kl = torch.zeros_like(policy)
        reference = old if ref_logp is None else entries.join(ref_logp.detach())
        if algo.kl_coef:
            kl = algo.kl_coef * (entries.kl_weight * kl_penalty(unit, reference, algo.kl_estimator)).sum()
        loss = policy + kl
        if self.certainty is not None:
            certain = self.certainty.entropy_weight * (entries.policy_weight * entropy).sum()
            loss = loss + certain
            sums["certainty_loss"] = certain.detach()
        sums |= {"loss": loss.detach(), "policy_loss": policy.detach(), "kl_loss": kl.detach()}
        sums["tokens"] = torch.ones_like(logp, dtype=torch.float32).sum().detach()
        if ref_logp is not None:
            sums["ref_kl"] = kl_penalty(unit.detach(), reference, "k3").float().sum()
        if entropy is not None:
            sums["entropy"] = entropy.detach().float().sum()
        return LossTerms(loss, sums)

    def _clip(self) -> Clip:
        return Clip(self.algo.clip_low, self.algo.clip_high, self.algo.clip_dual, self.algo.clip_dynamic)

    def finalize(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """algo/ metrics of one update from its sums over micro-batches and ranks; see `statistics.finalize`."""
        return finalize(sums)

    def finalize_updates(self, updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """algo/ metrics of one step; see `statistics.finalize_updates`."""
        return finalize_updates(updates)


def find_preset(name: str) -> Preset:
    """A preset by name, or a user's own as `module:NAME` or `file.py:NAME`. Raises ConfigError with the nearest one."""
    if ":" in name:
        return user_code.load("algo.preset", name, lambda found: isinstance(found, Preset), "Preset")
    _known("preset", name, tuple(PRESETS))
    return PRESETS[name]


def build_objective(algo: AlgoConfig, max_tokens: int | None = None) -> Objective:
    """The objective that a recipe names. max_tokens: rollout.decoder.max_tokens, needed where `weights` is called
    with the normalizer `constant`. Raises ConfigError, with the nearest match for a wrong name."""
    _known("advantage", algo.advantage, ADVANTAGES)
    _known("ratio", algo.ratio, UNITS)
    _known("kl_estimator", algo.kl_estimator, KL_ESTIMATORS)
    _known("kl_reference", algo.kl_reference, KL_REFERENCES)
    _known("normalizer", algo.normalizer, NORMALIZERS)
    _known("score_by", algo.score_by, SCORE_BY)
    if algo.kl_normalizer:
        _known("kl_normalizer", algo.kl_normalizer, KL_NORMALIZERS)
    preset = find_preset(algo.preset)
    for name in ("clip_low", "clip_high", "clip_dual", "kl_coef", "random_share"):
        if not getattr(algo, name) >= 0:
            raise ConfigError(f"algo.{name}={getattr(algo, name)}: must not be negative")
    planner, bound, certainty = preset.make(algo)
    objective = Objective(preset, algo, planner, bound, max_tokens, certainty)
    if certainty is not None and algo.ratio != "token":
        raise ConfigError(f"algo.ratio={algo.ratio}: certainty is forced token by token; set algo.ratio=token")
    if bound is not None and algo.ratio != "sequence":
        raise ConfigError(f"algo.ratio={algo.ratio}: preset {algo.preset} bounds whole responses; set algo.ratio=sequence")
    if objective.needs_step_rewards and algo.ratio in ("position", "sequence"):
        raise ConfigError(
            f"algo.ratio={algo.ratio} joins rows, but in preset {algo.preset} every row has an advantage of its own; set "
            "algo.ratio=token or step"
        )
    return objective


def _known(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        nearest = get_close_matches(value, choices, 1, 0.0)[0]
        raise ConfigError(f"algo.{key}={value}: known are {', '.join(choices)}; did you mean {nearest}?")
