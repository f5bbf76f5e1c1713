"""Generalised advantage estimation over denoising steps, for a value per token."""

from __future__ import annotations

import numpy as np


def place_reward(reward: float, steps: np.ndarray, trainable: np.ndarray) -> np.ndarray:
    """float64[L]: the response's reward on every trainable token of the last trainable step, 0 elsewhere.

    steps int[L], trainable bool[L]. All 0 if nothing is trainable.
    """
    rewards = np.zeros(len(steps))
    if trainable.any():
        rewards[trainable & (steps == steps[trainable].max())] = reward
    return rewards


def gae_over_steps(
    rewards: np.ndarray, values: np.ndarray, steps: np.ndarray, trainable: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """(returns, advantages), float32[L] each, 0 where not trainable, for one response.

    rewards, values float[L]; steps int[L]: denoising step of each token, collapsed if rows are (`collapse_steps`),
    ordered in time over the whole response; trainable bool[L]. With r*, V* the means over the trainable tokens of a
    step:

        R*_t = r*_t + gamma R*_{t+1}        A*_t = r*_t - V*_t + gamma V*_{t+1} + gamma lam A*_{t+1}

    A token has its own reward and value, and the means of the step after its own: R_j = r_j + gamma R*_{t+1},
    A_j = r_j - V_j + gamma V*_{t+1} + gamma lam A*_{t+1}. So gamma = lam = 1 with one final reward gives R_j = reward
    and A_j = reward - V_j. Source: the diffusion value model of TraceRL, arXiv 2509.06949.
    """
    returns, advantages = np.zeros(len(steps), np.float32), np.zeros(len(steps), np.float32)
    _, place = np.unique(steps[trainable], return_inverse=True)
    own_reward = np.asarray(rewards, np.float64)[trainable]
    own_value = np.asarray(values, np.float64)[trainable]
    count = np.bincount(place)
    reward = np.bincount(place, own_reward) / count
    value = np.append(np.bincount(place, own_value) / count, 0.0)  # nothing comes after the last step
    future_return, future_advantage = np.zeros(len(count) + 1), np.zeros(len(count) + 1)
    for t in range(len(count) - 1, -1, -1):
        future_return[t] = reward[t] + gamma * future_return[t + 1]
        delta = reward[t] - value[t] + gamma * value[t + 1]
        future_advantage[t] = delta + gamma * lam * future_advantage[t + 1]
    after = place + 1
    returns[trainable] = own_reward + gamma * future_return[after]
    advantages[trainable] = own_reward - own_value + gamma * value[after] + gamma * lam * future_advantage[after]
    return returns, advantages
