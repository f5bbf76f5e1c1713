"""Step credit: the full prediction of every denoising step has a reward of its own, and rows carry an advantage each (MDPO,
arXiv 2508.13148)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from rlpipe.errors import ConfigError, VerifierFailed
from rlpipe.objectives.rows import Rows
from rlpipe.trajectory import Trajectory

SCORES = ("all_masked", "committed")
WEIGHTS = ("confidence", "none")
SCALES = ("length", "none")
PICKS = ("top", "all", "random")
EPS = 1e-4  # as published; beside the standard deviation, and beside the number of masks
UNSEEN = -1  # no token has this id
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class ChosenSteps:
    """A few denoising steps of every rollout, each with the advantage of the prediction that the sampler made there.

    steps: how many, the same ones for the whole batch · score: 'all_masked' positions of the state, or those that the step
    'committed' · weight: 'confidence' multiplies each token by the probability it was drawn with, 'none' · scale: 'length'
    multiplies the advantage by λ = L / (masks + 1e-4) of a response of L tokens, 'none' · scale_cap: largest λ, 0: no cap ·
    pick: see `choose_steps` · stride: steps between two that are recorded and scored (the first and the last always are); the
    others have no reward and no row.

    Trajectories must bring predictions and step rewards. A row shows the state x_t before its step and scores the prediction:
    its `targets` are the tokens drawn at the masked positions and what x_t holds at the others, which under a decoder that
    takes tokens back is not always the final token. Late steps have few masks, hence a very large λ: scale_cap bounds it.
    Where we differ: steps are chosen over the whole batch and not on each rank, and rows without an advantage are left out
    instead of being passed for nothing, so no KL is taken there.
    """

    steps: int = 8
    score: str = "all_masked"
    weight: str = "confidence"
    scale: str = "length"
    scale_cap: float = 0.0
    pick: str = "top"
    stride: int = 1

    def __post_init__(self) -> None:
        for name, known in (("score", SCORES), ("weight", WEIGHTS), ("scale", SCALES), ("pick", PICKS)):
            value = getattr(self, name)
            if value not in known:
                near = get_close_matches(str(value), known, 1, 0.0)[0]
                raise ConfigError(f"algo.options.{name}={value}: known are {', '.join(known)}; did you mean {near}?")
        if self.steps < 1 or self.stride < 1 or not self.scale_cap >= 0:
            raise ConfigError(
                f"algo.options: steps={self.steps} and stride={self.stride} must be at least 1, scale_cap={self.scale_cap} not "
                "negative (0: off)"
            )

    @property
    def replays_rollout(self) -> bool:
        return self.score == "committed" and self.pick == "all" and self.weight == "none"

    @property
    def needs_step_rewards(self) -> bool:
        return True

    def plan_all(self, trajectories: Sequence[Trajectory], rng: np.random.Generator) -> list[Rows]:
        """Rows of each trajectory of one batch; groups are those of equal uid. Raises ValueError for trajectories without
        predictions or with another number of step rewards, VerifierFailed for rewards that are not finite."""
        advantages = batch_advantages(trajectories)
        places = choose_steps(advantages, self.steps, self.pick, rng)
        return [self._rows(*each) for each in zip(trajectories, advantages, places, strict=True)]

    def _rows(self, trajectory: Trajectory, advantage: np.ndarray, places: np.ndarray) -> Rows:
        """advantage float32[S], places int64[R] into the recorded steps."""
        made = trajectory.predictions
        steps = made.step[places].astype(np.int32)
        masked = _states(trajectory, steps) == UNSEEN
        scored = masked
        if self.score == "committed":
            scored = masked & (_states(trajectory, steps + 1) != UNSEEN) & ~trajectory.preset()
        rows = Rows(
            masked=masked,
            scored=scored,
            step=steps,
            targets=made.tokens[places],
            weight=made.confidence[places] if self.weight == "confidence" else None,
            credit=(advantage[places] * self._scale(masked)).astype(np.float32),
        )
        return rows.take(scored.any(1))

    def _scale(self, masked: np.ndarray) -> np.ndarray:
        """float64[R]: λ of each row."""
        if self.scale == "none":
            return np.ones(len(masked))
        scale = masked.shape[1] / (masked.sum(1) + EPS)
        return np.minimum(scale, self.scale_cap) if self.scale_cap else scale


def _states(trajectory: Trajectory, steps: np.ndarray) -> np.ndarray:
    """int32[R, L]: the canvas before each step, UNSEEN where it is masked."""
    states = [trajectory.state(int(step), UNSEEN) for step in steps]
    return np.stack(states) if states else np.zeros((0, trajectory.response_len), np.int32)


def step_credit(rewards: np.ndarray) -> np.ndarray:
    """rewards float[S] of the predictions of one response → float64[S]: the change that step t made, r_t - r_{t-1} with
    r_{-1} = 0, plus 1, plus the mean of the rewards behind it (at the last step: its own). The 1 cancels in the baseline."""
    rewards = np.asarray(rewards, np.float64)
    behind = np.cumsum(rewards[::-1])[::-1] - rewards
    later = np.arange(len(rewards))[::-1]
    future = np.where(later > 0, behind / np.maximum(later, 1), rewards)
    return np.diff(rewards, prepend=0.0) + 1.0 + future


def step_advantages(rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
    """rewards float[S_i] of each response of one group (or float[G, T]) → float32[S_i]: `step_credit`, standardised step by
    step over the group with the unbiased standard deviation + 1e-4.

    A step's statistics are over the responses that have it, so the last steps of the longest ones compare fewer. Where only one
    response has the step, or all have the same credit, the advantage is 0 exactly. Raises VerifierFailed if a reward is not
    finite. Source: MDPO, arXiv 2508.13148, where all responses have equally many steps.
    """
    lengths = [len(own) for own in rewards]
    if not any(lengths):
        return [np.zeros(0, np.float32) for _ in lengths]
    credit = np.full((len(lengths), max(lengths)), np.nan)  # NaN: the response is over
    for row, own in zip(credit, rewards, strict=True):
        if not np.isfinite(own).all():
            raise VerifierFailed(
                f"step rewards {np.asarray(own).tolist()} are not all finite; make the verifier return a number or raise"
            )
        row[: len(own)] = step_credit(own)
    count = (~np.isnan(credit)).sum(0)
    differs = np.nanmax(credit, 0) - np.nanmin(credit, 0) > ROUNDING  # rounding of the mean must not become a signal
    centred = credit - np.nanmean(credit, 0)
    deviation = np.sqrt(np.nansum(centred**2, 0) / np.maximum(count - 1, 1))
    advantages = np.where(differs, centred / (deviation + EPS), 0.0).astype(np.float32)
    return [row[:length] for row, length in zip(advantages, lengths, strict=True)]


def batch_advantages(trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
    """float32[S] of each trajectory: `step_advantages` of the groups of equal uid. Raises ValueError for a trajectory without
    predictions or with another number of step rewards."""
    groups: dict[str, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        made, rewards = trajectory.predictions, trajectory.step_rewards
        if made is None or rewards is None or len(rewards) != len(made):
            raise ValueError(
                f"trajectory {trajectory.uid}#{trajectory.sample}: step credit needs predictions and a reward for each; "
                "ask the rollout for predictions and score them first"
            )
        groups.setdefault(trajectory.uid, []).append(index)
    found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(trajectories)
    for members in groups.values():
        for index, own in zip(members, step_advantages([trajectories[i].step_rewards for i in members]), strict=True):
            found[index] = own
    return found


def choose_steps(
    advantages: Sequence[np.ndarray], count: int, pick: str = "top", rng: np.random.Generator | None = None
) -> list[np.ndarray]:
    """advantages float[S_i] of every response of a batch → the steps that each trains on, int64, rising.

    top: the `count` steps of largest Σ|A_t| over the batch, the earlier of equals; one set that all responses share ·
    random: `count` of the steps that anybody has an advantage at, all as likely, shared likewise (needs rng) ·
    all: every step of every response. Except under `all`, a response leaves out steps that it does not have or has no
    advantage at, so a dead group costs no pass. Source: MDPO, arXiv 2508.13148; see `ChosenSteps`.
    """
    if pick == "all":
        return [np.arange(len(own)) for own in advantages]
    total = np.zeros(max((len(own) for own in advantages), default=0))
    for own in advantages:
        total[: len(own)] += np.abs(own)
    alive = np.flatnonzero(total)
    if pick == "random":
        shared = rng.choice(alive, min(count, len(alive)), replace=False)
    else:
        shared = alive[np.argsort(-total[alive], kind="stable")[:count]]
    mine = [np.sort(shared[shared < len(own)]) for own in advantages]
    return [steps[own[steps] != 0] for steps, own in zip(mine, advantages, strict=True)]
