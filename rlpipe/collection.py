"""One step's experience: groups with rewards, advantages and what there is to say about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlpipe.config import RunConfig
from rlpipe.errors import VerifierFailed
from rlpipe.monitor.monitor import SampleRow
from rlpipe.objectives.advantages import has_signal as _has_signal
from rlpipe.objectives.objective import Objective
from rlpipe.objectives.overlong import is_overlong, kept, shaped
from rlpipe.objectives.step_credit import step_advantages
from rlpipe.rollout.pool import Group, RolloutPool
from rlpipe.sampling.engine import EngineCounters
from rlpipe.trajectory import Trajectory, replace


@dataclass(slots=True)
class Harvest:
    """groups: those to learn from, in order of their prompts · trajectories and advantages float32[N]: flat over the groups,
    without responses that are left out of the loss · tokens: valid response tokens sampled for the step, dropped groups
    included · lags: versions that each group is behind the policy it trains · record: indices of the step's prompts by their
    fate: trained, without_signal, failed."""

    groups: list[Group]
    trajectories: list[Trajectory]
    advantages: np.ndarray
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    lags: list[int] = field(default_factory=list)
    record: dict[str, list[int]] = field(default_factory=dict)

    def sample_rows(self, count: int, rollouts: RolloutPool) -> list[SampleRow]:
        """Responses to show: the first of each group, then the second …, up to `count`."""
        per_group = len(self.groups[0].texts)
        order = [(g, s) for s in range(per_group) for g in range(len(self.groups))][:count]
        trajectories = [self.groups[g].trajectories[s] for g, s in order]
        advantage = {(t.uid, t.sample): float(a) for t, a in zip(self.trajectories, self.advantages, strict=True)}
        token_texts = rollouts.token_texts([t.response_ids for t in trajectories])
        return [
            SampleRow(
                uid=f"{t.uid}#{t.sample}",
                prompt=self.groups[g].prompt.text,
                response=self.groups[g].texts[s],
                reward=float(self.groups[g].rewards[s]),
                advantage=advantage.get((t.uid, t.sample), 0.0),
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
    """What a step took. sampled: groups that could be scored, in order of their prompts · failed: those that could not ·
    rounds: of fresh prompts · asked: responses and predictions to score · judged: different ones among them · sampling_s,
    judging_s: time in which any group was sampled, or, without that, any judged."""

    sampled: list[Group] = field(default_factory=list)
    failed: list[VerifierFailed] = field(default_factory=list)
    rounds: int = 0
    asked: int = 0
    judged: int = 0
    counters: EngineCounters = field(default_factory=EngineCounters)
    sampling_s: float = 0.0
    judging_s: float = 0.0


class GroupScoring:
    """From verdicts to rewards, and from groups to a step's harvest; holds no state."""

    def __init__(self, cfg: RunConfig, objective: Objective):
        self.cfg, self.objective = cfg, objective
        judged = cfg.value.enabled and cfg.value.step_rewards
        self.stride = objective.planner.stride if objective.needs_step_rewards else int(judged)  # of predictions; 0: none

    def texts(self, group: Group) -> list[str]:
        """The responses, then what the predictions of each read; most of these are alike, and the pool judges what differs."""
        steps = zip(group.step_texts, group.step_index, strict=True)
        return [*group.texts, *(texts[place] for texts, index in steps for place in index)]

    def settle(self, group: Group, verdicts: Sequence[dict[str, float]]) -> None:
        """Fill in parts, step rewards and rewards; verdicts of all its `texts`, in order."""
        group.parts = list(verdicts[: len(group.texts)])
        if self.stride:
            _take_step_rewards(group, verdicts[len(group.texts) :])
        rewards = np.array([part["reward"] for part in group.parts], np.float32)
        algo, budget = self.cfg.algo, self.cfg.rollout.decoder.max_tokens
        group.rewards = shaped(rewards, group.trajectories, algo.overlong, budget, algo.overlong_buffer)

    def has_signal(self, group: Group) -> bool:
        """With step credit the rewards of all predictions are judged together: a group may be wrong in the end throughout and
        still teach which steps went astray."""
        rewards = group.rewards
        if self.stride:
            steps = [trajectory.step_rewards for trajectory in group.trajectories]
            if not any(own.any() for own in step_advantages(steps)):
                return False
            rewards = np.concatenate(steps)
        algo = self.cfg.algo
        live = _has_signal(rewards, algo.accuracy_low, algo.accuracy_high)
        right = [part["correct"] for part in group.parts if "correct" in part]
        if right and (algo.accuracy_low > 0 or algo.accuracy_high < 1):  # a band of accuracy is not one of weighted rewards
            live = live and algo.accuracy_low < float(np.mean(right)) < algo.accuracy_high
        return live and bool(kept(group.trajectories, algo.overlong).any())

    def nothing_to_learn(self, step: int, tally: Tally) -> str:
        rewards = np.concatenate([group.rewards for group in tally.sampled]) if tally.sampled else np.zeros(0)
        mean = f"mean reward {rewards.mean():.3f}" if len(rewards) else "no group scored"
        return (
            f"step {step}: none of {len(tally.sampled)} groups in {tally.rounds} rounds has a learning signal ({mean}; a group "
            f"needs different rewards, its mean inside {self.cfg.algo.accuracy_low:g} to {self.cfg.algo.accuracy_high:g}"
            f"{self._overlong_note(tally)}). Use "
            "easier or harder prompts, a higher rollout.decoder.temperature, more algo.samples_per_prompt or refill_rounds, or "
            "a longer warm start"
        )

    def _overlong_note(self, tally: Tally) -> str:
        if self.cfg.algo.overlong == "score" or not tally.sampled:
            return ""
        share = np.mean([is_overlong(t) for group in tally.sampled for t in group.trajectories])
        return f"; algo.overlong={self.cfg.algo.overlong} struck {share:.0%} of the responses, which ended without EOS"

    def harvest(self, live: Sequence[Group], tally: Tally) -> Harvest:
        """live: groups to learn from, in order of their prompts."""
        shown = np.concatenate([kept(group.trajectories, self.cfg.algo.overlong) for group in live])
        advantages = np.concatenate([self.objective.advantages(group.rewards) for group in live]).astype(np.float32)[shown]
        trajectories = [trajectory for group in live for trajectory in group.trajectories]
        trajectories = [trajectory for trajectory, show in zip(trajectories, shown, strict=True) if show]
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
        if self.cfg.algo.overlong in ("zero", "soft"):
            parts["reward/before_overlong"] = float(np.mean([part["reward"] for g in tally.sampled for part in g.parts]))
        parts |= self._step_metrics(records, rewards, tally)
        return parts | {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/verifier_calls": float(tally.judged),
            "reward/verifier_calls_saved": 1.0 - tally.judged / max(1, tally.asked),
            "reward/failed_groups": float(len(tally.failed)),
            "rollout/groups": float(len(tally.sampled)),
            "rollout/rounds": float(tally.rounds),
            "rollout/response_len": float(lengths.mean()),
            "rollout/eos_share": float(np.mean([t.stop == "eos" for t in records])),
            "rollout/overlong_share": float(np.mean([is_overlong(t) for t in records])),
            "rollout/tokens_per_step": float(lengths.sum() / steps.sum()),
            "rollout/forced_share": float(np.concatenate([t.events.forced for t in records]).mean()),
            "algo/live_groups": float(sum(self.has_signal(group) for group in live)),
            "algo/live_share": float(np.mean([self.has_signal(group) for group in tally.sampled])),
            "perf/rollout_s": tally.sampling_s,
            "perf/verify_s": tally.judging_s,
            "perf/rollout_tokens_per_s": counters.tokens / max(tally.sampling_s, 1e-9),
            "perf/tokens_per_forward": counters.tokens / max(1, counters.forwards),
            "perf/slot_occupancy": counters.occupancy,
            "perf/cache_mb": counters.cache_bytes / 2**20,
            "perf/rows_per_token": counters.rows / max(1, counters.tokens),
            "perf/head_rows_per_token": counters.head_rows / max(1, counters.tokens),
        }

    def _step_metrics(self, records: Sequence[Trajectory], rewards: np.ndarray, tally: Tally) -> dict[str, float]:
        """Of all sampled predictions: their mean reward, and the share of responses that some prediction of theirs surpassed
        (for rewards of 0 and 1: right on the way, wrong in the end)."""
        if not self.stride:
            return {}
        best = np.array([t.step_rewards.max() for t in records])
        return {
            "reward/step_mean": float(np.concatenate([t.step_rewards for t in records]).mean()),
            "reward/backslide_share": float((best > rewards).mean()),
            "perf/predictions_mb": sum(t.predictions.nbytes for t in records) / 2**20,
        }


def _take_step_rewards(group: Group, verdicts: Sequence[dict[str, float]]) -> None:
    """Give each trajectory the rewards of its predictions; verdicts of all of them, in order."""
    rewards = np.array([verdict["reward"] for verdict in verdicts], np.float32)
    ends = np.cumsum([len(index) for index in group.step_index])[:-1]
    steps = zip(group.trajectories, np.split(rewards, ends), strict=True)
    group.trajectories = [replace(trajectory, step_rewards=own) for trajectory, own in steps]
