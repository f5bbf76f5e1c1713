"""From values of states to advantages and returns of tokens: GAE over the denoising steps of every response."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlpipe.errors import ConfigError, RlpipeError
from rlpipe.learner.step import StepPlan
from rlpipe.objectives.gae import gae_over_steps, place_reward
from rlpipe.objectives.planner import collapse_steps, response_blocks
from rlpipe.trajectory import Trajectory


def with_values(
    plan: StepPlan,
    trajectories: Sequence[Trajectory],
    rewards: np.ndarray,
    values: Sequence[np.ndarray],
    *,
    gamma: float,
    lam: float,
    shrink: int,
    gate: float,
    stepwise: bool = False,
) -> tuple[StepPlan, dict[str, float]]:
    """The plan with returns, and with advantages from the values once these explain at least `gate` of the returns' variance.

    rewards float32[N]: of the trajectories, relative to their groups as without a value model; they fall due at a response's
    last step. stepwise: instead every step pays what it changed in the reward of the full prediction, see `step_dues` ·
    values: float32[M] of each sample, empty for those that are not trained on. Below the gate the policy keeps the plan's
    advantages and only the value model learns. Metrics: value/explained_variance, value/mean, value/bias (mean of value -
    return), value/in_use. Raises ConfigError if a token is scored in more than one row: it would have several values.
    """
    samples = list(plan.samples)
    own: dict[int, list[int]] = {}
    for index in (i for update in plan.updates for i in update):
        own.setdefault(plan.owner[index], []).append(index)
    mean = _group_means(trajectories) if stepwise else {}
    every_return, every_value = [], []
    for number, indices in own.items():
        trajectory = trajectories[number]
        place = [np.nonzero(samples[i].scored)[1] for i in indices]
        value = np.zeros(trajectory.response_len, np.float32)
        trainable = np.zeros(trajectory.response_len, bool)
        for i, where in zip(indices, place, strict=True):
            if trainable[where].any() or len(np.unique(where)) != len(where):
                raise ConfigError(
                    "value.enabled=true: the rows of this algo.preset score a token more than once, so it would have several "
                    "values; use a preset whose rows score each token once, such as tracerl, or set value.enabled=false"
                )
            value[where], trainable[where] = values[i], True
        steps = collapse_steps(trajectory.step_map(), shrink, response_blocks(trajectory))
        if stepwise:
            due = step_dues(trajectory, steps, trainable, mean[trajectory.uid])
        else:
            due = place_reward(float(rewards[number]), steps, trainable)
        returns, advantages = gae_over_steps(due, value, steps, trainable, gamma, lam)
        for i, where in zip(indices, place, strict=True):
            samples[i] = dataclasses.replace(samples[i], returns=returns[where], advantage=advantages[where])
        every_return.append(returns[trainable])
        every_value.append(value[trainable])
    metrics = _metrics(np.concatenate(every_return), np.concatenate(every_value))
    metrics["value/in_use"] = float(metrics["value/explained_variance"] >= gate)
    if not metrics["value/in_use"]:
        samples = [dataclasses.replace(s, advantage=p.advantage) for s, p in zip(samples, plan.samples, strict=True)]
    return dataclasses.replace(plan, samples=samples), metrics


def step_dues(trajectory: Trajectory, steps: np.ndarray, trainable: np.ndarray, mean: float) -> np.ndarray:
    """float64[L]: on the trainable tokens of each step what it changed: the reward of the full prediction made there less that
    of the step before, and at the first step less the group's mean; so a response's dues add up to its reward relative to its
    group.

    steps int[L]: 1-based denoising step of each token, merged ones named by the last of them. Steps without a trainable token
    leave their share to the next one that has. Source of the differences: MDPO, arXiv 2508.13148.
    """
    due, paid = np.zeros(len(steps)), float(mean)
    rewards = np.asarray(trajectory.step_rewards, np.float64)
    known = np.append(trajectory.predictions.step + 1, np.iinfo(np.int64).max)
    present = np.unique(steps[trainable])
    for place, step in enumerate(present):
        last = place == len(present) - 1  # what came behind the last scored token is its too
        reward = rewards[-1] if last else rewards[max(0, int(np.searchsorted(known, step, side="right")) - 1)]
        due[trainable & (steps == step)] = reward - paid
        paid = reward
    return due


def _group_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Mean reward of each prompt's answers: those of the last predictions."""
    final: dict[str, list[float]] = {}
    for trajectory in trajectories:
        final.setdefault(trajectory.uid, []).append(float(trajectory.step_rewards[-1]))
    return {uid: float(np.mean(found)) for uid, found in final.items()}


def _metrics(returns: np.ndarray, values: np.ndarray) -> dict[str, float]:
    spread = float(returns.var())
    explained = 1.0 - float((returns - values).var()) / spread if spread else 0.0
    return {
        "value/explained_variance": explained,
        "value/mean": float(values.mean()),
        "value/bias": float((values - returns).mean()),
    }


def finalize_value(updates: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """value/ metrics of a step from the value model's updates. Raises RlpipeError if its loss is not finite."""
    if not updates:
        return {}
    losses = [update["sums"].get("value_loss", 0.0) for update in updates]
    norms = [float(update["grad_norm"]) for update in updates]
    if not all(map(math.isfinite, losses + norms)):
        raise RlpipeError(
            f"the value model's losses are {losses}, its gradient norms {norms}: its weights are lost. Go back to the last "
            "checkpoint with a lower value.lr"
        )
    return {
        "value/loss": sum(losses) / len(losses),
        "value/grad_norm": sum(norms) / len(norms),
        "value/lr": float(updates[-1]["lr"]),
    }
