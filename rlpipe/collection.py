"""One step's experience: prompts out, groups with rewards and advantages back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from rlpipe.config import RunConfig
from rlpipe.errors import NoLiveGroups, VerifierFailed
from rlpipe.monitor.monitor import Monitor, SampleRow
from rlpipe.objectives.advantages import has_signal
from rlpipe.objectives.objective import Objective
from rlpipe.objectives.step_credit import step_advantages
from rlpipe.rollout.pool import Group, RolloutPool
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Trajectory, replace
from rlpipe.verifiers.pool import VerifierPool


@dataclass(slots=True)
class Harvest:
    """groups: those to learn from, in order of their prompts · trajectories and advantages float32[N]: flat over the groups ·
    tokens: valid response tokens sampled for the step, dropped groups included."""

    groups: list[Group]
    trajectories: list[Trajectory]
    advantages: np.ndarray
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)

    def sample_rows(self, count: int, rollouts: RolloutPool) -> list[SampleRow]:
        """Responses to show: the first of each group, then the second …, up to `count`."""
        per_group = len(self.groups[0].texts)
        order = [(g, s) for s in range(per_group) for g in range(len(self.groups))][:count]
        trajectories = [self.groups[g].trajectories[s] for g, s in order]
        token_texts = rollouts.token_texts([t.response_ids for t in trajectories])
        return [
            SampleRow(
                uid=f"{t.uid}#{t.sample}",
                prompt=self.groups[g].prompt.text,
                response=self.groups[g].texts[s],
                reward=float(self.groups[g].rewards[s]),
                advantage=float(self.advantages[g * per_group + s]),
                tokens=t.valid_len,
                steps=int(t.events.step.max()) + 1,
                step_map=t.step_map().tolist() if t.is_monotone() else None,
                token_texts=texts,
                parts=self.groups[g].parts[s],
            )
            for (g, s), t, texts in zip(order, trajectories, token_texts, strict=True)
        ]


@dataclass(slots=True)
class Tally:
    """Counts over the rounds of one step. texts: responses and predictions to score · calls: of the verifier for them."""

    sampled: list[Group] = field(default_factory=list)
    failed: list[VerifierFailed] = field(default_factory=list)
    rounds: int = 0
    texts: int = 0
    calls: int = 0
    counters: EngineCounters = field(default_factory=EngineCounters)
    rollout_s: float = 0.0
    verify_s: float = 0.0


class Collector:
    """Waits for: rollout and verifier pools. Consumes: prompts from the cursor. Produces: a `Harvest` a step."""

    def __init__(
        self,
        cfg: RunConfig,
        cursor: Any,
        rollouts: RolloutPool,
        verifiers: VerifierPool,
        objective: Objective,
        monitor: Monitor,
    ):
        self.cfg, self.cursor, self.objective, self.monitor = cfg, cursor, objective, monitor
        self.rollouts, self.verifiers = rollouts, verifiers
        judged = cfg.value.enabled and cfg.value.step_rewards
        self.stride = objective.planner.stride if objective.needs_step_rewards else int(judged)  # of predictions; 0: none

    def collect(self, step: int) -> Harvest:
        """Groups with a learning signal. Under `groups: refill` those without one are replaced by fresh prompts, for up to
        `refill_rounds` more rounds; a step may then train on fewer. Raises NoLiveGroups if none is left, VerifierFailed if
        too many groups failed."""
        algo, live, tally = self.cfg.algo, [], Tally()
        wanted = algo.prompts_per_step
        while True:
            scored = self._sample_and_score(wanted - len(live), step, tally)
            live += [group for group in scored if algo.groups == "keep" or self._has_signal(group)]
            refill = algo.groups == "refill" and tally.rounds <= algo.refill_rounds
            if len(live) >= wanted or not refill:
                break
        if not any(self._has_signal(group) for group in live):
            raise NoLiveGroups(self._nothing_to_learn(step, tally))
        return self._harvest(live, tally)

    def _sample_and_score(self, count: int, step: int, tally: Tally) -> list[Group]:
        tally.rounds += 1
        prompts, algo = self.cursor.take(count), self.cfg.algo
        started = time.perf_counter()
        what = f"step {step}: sampling {count} prompts × {algo.samples_per_prompt}"
        groups, counters = self.rollouts.generate(
            prompts, algo.samples_per_prompt, self.cfg.rollout.decoder, what=what, predictions=self.stride
        )
        sampled_at = time.perf_counter()
        texts = [_different_texts(group) if self.stride else group.texts for group in groups]
        scores = self.verifiers.score_groups(
            [[(group.prompt, text) for text in own] for group, own in zip(groups, texts, strict=True)]
        )
        tally.rollout_s += sampled_at - started
        tally.verify_s += time.perf_counter() - sampled_at
        tally.counters = tally.counters + counters
        tally.calls += sum(map(len, texts))
        tally.texts += sum(len(group.texts) + sum(map(len, group.step_index)) for group in groups)
        scored = []
        for group, own, score in zip(groups, texts, scores, strict=True):
            if isinstance(score, VerifierFailed):  # the whole group goes; a failure is never a reward
                self.monitor.warn(f"step {step}: {score}")
                tally.failed.append(score)
                continue
            group.parts = _take_step_rewards(group, dict(zip(own, score, strict=True))) if self.stride else score
            group.rewards = np.array([part["reward"] for part in group.parts], np.float32)
            scored.append(group)
        tally.sampled += scored
        attempted = len(tally.sampled) + len(tally.failed)
        if len(tally.failed) > self.cfg.verifier.max_failed_groups * max(attempted, algo.prompts_per_step):
            raise VerifierFailed(
                f"step {step}: {len(tally.failed)} of {attempted} groups could not be scored (limit verifier.max_failed_groups="
                f"{self.cfg.verifier.max_failed_groups:g}). Last cause: {tally.failed[-1]}"
            )
        return scored

    def _has_signal(self, group: Group) -> bool:
        """With step credit the rewards of all predictions are judged together: a group may be wrong in the end throughout and
        still teach which steps went astray."""
        rewards = group.rewards
        if self.stride:
            steps = [trajectory.step_rewards for trajectory in group.trajectories]
            if not any(own.any() for own in step_advantages(steps)):
                return False
            rewards = np.concatenate(steps)
        return has_signal(rewards, self.cfg.algo.accuracy_low, self.cfg.algo.accuracy_high)

    def _nothing_to_learn(self, step: int, tally: Tally) -> str:
        rewards = np.concatenate([group.rewards for group in tally.sampled]) if tally.sampled else np.zeros(0)
        mean = f"mean reward {rewards.mean():.3f}" if len(rewards) else "no group scored"
        return (
            f"step {step}: none of {len(tally.sampled)} groups in {tally.rounds} rounds has a learning signal ({mean}; a group "
            f"needs different rewards, its mean inside {self.cfg.algo.accuracy_low:g} to {self.cfg.algo.accuracy_high:g}). Use "
            "easier or harder prompts, a higher rollout.decoder.temperature, more algo.samples_per_prompt or refill_rounds, or "
            "a longer warm start"
        )

    def _harvest(self, live: Sequence[Group], tally: Tally) -> Harvest:
        advantages = np.concatenate([self.objective.advantages(group.rewards) for group in live]).astype(np.float32)
        trajectories = [trajectory for group in live for trajectory in group.trajectories]
        return Harvest(list(live), trajectories, advantages, tally.counters.tokens, self._metrics(live, tally))

    def _metrics(self, live: Sequence[Group], tally: Tally) -> dict[str, float]:
        rewards = np.concatenate([group.rewards for group in tally.sampled])
        records = [trajectory for group in tally.sampled for trajectory in group.trajectories]
        lengths = np.array([t.valid_len for t in records])
        steps = np.array([int(t.events.step.max()) + 1 for t in records])
        counters = tally.counters
        names = sorted({name for group in tally.sampled for part in group.parts for name in part} - {"reward"})
        parts = {
            f"reward/{name}": float(np.mean([part[name] for g in tally.sampled for part in g.parts if name in part]))
            for name in names
        }
        parts |= self._step_metrics(records, rewards, tally)
        return parts | {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/failed_groups": float(len(tally.failed)),
            "rollout/groups": float(len(tally.sampled)),
            "rollout/rounds": float(tally.rounds),
            "rollout/response_len": float(lengths.mean()),
            "rollout/eos_share": float(np.mean([t.stop == "eos" for t in records])),
            "rollout/tokens_per_step": float(lengths.sum() / steps.sum()),
            "rollout/forced_share": float(np.concatenate([t.events.forced for t in records]).mean()),
            "algo/live_groups": float(sum(self._has_signal(group) for group in live)),
            "algo/live_share": float(np.mean([self._has_signal(group) for group in tally.sampled])),
            "perf/rollout_s": tally.rollout_s,
            "perf/verify_s": tally.verify_s,
            "perf/rollout_tokens_per_s": counters.tokens / tally.rollout_s,
            "perf/tokens_per_forward": counters.tokens / max(1, counters.forwards),
            "perf/slot_occupancy": counters.occupancy,
            "perf/cache_mb": counters.cache_bytes / 2**20,
            "perf/rows_per_token": counters.rows / max(1, counters.tokens),
            "perf/head_rows_per_token": counters.head_rows / max(1, counters.tokens),
        }

    def _step_metrics(self, records: Sequence[Trajectory], rewards: np.ndarray, tally: Tally) -> dict[str, float]:
        """Of all sampled predictions: their mean reward, and the share of responses that some prediction of theirs surpassed
        (for rewards of 0 and 1: right on the way, wrong in the end); and the share of texts whose verdict another had."""
        if not self.stride:
            return {}
        best = np.array([t.step_rewards.max() for t in records])
        return {
            "reward/step_mean": float(np.concatenate([t.step_rewards for t in records]).mean()),
            "reward/backslide_share": float((best > rewards).mean()),
            "reward/verifier_calls": float(tally.calls),
            "reward/verifier_calls_saved": 1.0 - tally.calls / tally.texts,
            "perf/predictions_mb": sum(t.predictions.nbytes for t in records) / 2**20,
        }


def _different_texts(group: Group) -> list[str]:
    """Every text of a group's responses and predictions once: a verdict is of the prompt and the text alone."""
    return list(dict.fromkeys([*group.texts, *chain.from_iterable(group.step_texts)]))


def _take_step_rewards(group: Group, verdicts: dict[str, dict[str, float]]) -> list[dict[str, float]]:
    """Give each trajectory the rewards of its predictions, from the verdict on each text; returns those on the responses."""
    rewards = [np.array([verdicts[text]["reward"] for text in texts], np.float32) for texts in group.step_texts]
    steps = zip(group.trajectories, rewards, group.step_index, strict=True)
    group.trajectories = [replace(trajectory, step_rewards=own[index]) for trajectory, own, index in steps]
    return [verdicts[text] for text in group.texts]
