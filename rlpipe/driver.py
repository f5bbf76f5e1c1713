"""The training loop: the one process that knows all of it.

prompts → rollouts → rewards → advantages → rows → update → weights, once a step. Nothing flows back but weights. In mode async
the first three go on while the others do: the feed begins prompts as soon as `max_lag` allows, and a step takes what is there.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlpipe import interruption, parity
from rlpipe.checkpoint import Checkpoints
from rlpipe.collection import Harvest
from rlpipe.config import RunConfig
from rlpipe.crew import Crew
from rlpipe.errors import CheckpointError, Interrupted, LearnerLost
from rlpipe.evaluation.training import evaluate, evaluate_hex
from rlpipe.feed import Feed
from rlpipe.learner.credit import finalize_value, with_values
from rlpipe.learner.step import StepPlan, draws_and_passes, plan_step
from rlpipe.monitor.monitor import Monitor
from rlpipe.objectives.objective import build_objective
from rlpipe.recipe import decoder_of_eval, fingerprint
from rlpipe.turns import Turns

log = logging.getLogger("rlpipe")

SHUFFLE = 0x5EED  # stream of the per-step generator that deals trajectories to updates


class Driver:
    """One run, from its first weights to its summary. `state` is what a checkpoint must carry besides the learner; its step is
    that of the last finished step, which is also the version of the weights."""

    def __init__(
        self,
        cfg: RunConfig,
        monitor: Monitor,
        source: Any,
        cursor: Any,
        crew: Crew,
        checkpoints: Checkpoints,
        resume_from: Path | None = None,
    ):
        self.cfg, self.monitor, self.source = cfg, monitor, source
        self.crew, self.checkpoints, self.resume_from = crew, checkpoints, resume_from
        self.objective = build_objective(cfg.algo, cfg.rollout.decoder.max_tokens)
        self.feed = Feed(cfg, cursor, crew.rollouts, crew.verifiers, self.objective, monitor)
        self.turns = Turns(cfg, crew.trained, crew.rollouts)
        self.timed = monitor.timeline.timed
        self.restarts = 0  # of the learner
        self.finished = False
        self.state: dict[str, Any] = {
            "step": 0,
            "eval_start": None,
            "parity_max_abs_delta": 0.0,
            "tokens": 0,
            "seconds": 0.0,
        }
        self.beginning = self.state | self.feed.state()

    @property
    def step(self) -> int:
        return self.state["step"]

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the summary. Failures leave the last checkpoint and reach the caller."""
        try:
            self.turns.to_learner()
            self.checkpoints.check(self.crew.trained)
            self.resume()
        except LearnerLost as error:
            self.recover(error)
        while not self.finished:
            try:
                self.advance()
            except LearnerLost as error:
                self.recover(error)
            except CheckpointError as error:
                if not isinstance(error.__cause__, LearnerLost):
                    raise
                self.recover(error.__cause__)
            except Interrupted as error:
                self.leave(error)
                raise
        return self.summary()

    def advance(self) -> None:
        """The next step, or what a start has to do before it, or the end."""
        if self.step == self.cfg.steps and self.feed.version == self.step:
            self.checkpoints.finish()
            self.finished = True
            return
        if self.feed.version < self.step:
            self.publish()
            if self.step == 0 and self.state["eval_start"] is None:
                self.evaluate_at_start()
            return
        with self.timed("driver", "step", step=self.step + 1):
            self.train_a_step(self.step + 1)

    def train_a_step(self, step: int) -> None:
        started = time.perf_counter()
        with self.timed("driver", f"wait for groups of step {step}"):
            harvest = self.feed.take(step)
        self.turns.to_learner()
        metrics = harvest.metrics | self.learn(step, harvest)
        self.state["step"] = step
        metrics |= self.publish()
        self.account(harvest, metrics, time.perf_counter() - started)
        if self.due(self.cfg.eval.every) and not (interruption.requested() and self.step < self.cfg.steps):
            metrics = self.evaluate(metrics)
        self.report(harvest, metrics)
        if self.due(self.cfg.checkpoint.every):
            self.save()
            if self.turns.shared:
                self.publish()  # the rollout workers let go of it

    def learn(self, step: int, harvest: Harvest) -> dict[str, float]:
        """Rows, advantages, the optimizer updates, and the parity gauge that they are checked by."""
        algo, started = self.cfg.algo, time.perf_counter()
        draws, passes = draws_and_passes(algo)
        with self.timed("driver", "plan", step=step):
            plan = plan_step(
                harvest.trajectories,
                harvest.advantages,
                self.objective,
                updates=algo.updates_per_step,
                gauge_trajectories=self.cfg.parity.trajectories,
                rng=np.random.default_rng([self.cfg.seed, step, SHUFFLE]),
                draws=draws,
                version=step - 1,
            )
        metrics: dict[str, float] = {}
        if self.crew.value is not None:
            plan, metrics, pending = self.judge(plan, harvest)
        with self.timed("learner", "update", step=step, rows=plan.rows):
            updates, gauge = self.crew.learner.train(plan)
        metrics |= parity.measure(*gauge, algo.clip_low, algo.clip_high)
        metrics["parity/group_diversity"] = parity.diversity([group.texts for group in harvest.groups])
        parity.check(metrics, self.cfg.parity, step)
        if doubt := parity.doubts(metrics):
            self.monitor.warn(f"step {step}: {doubt}")
        metrics |= self.objective.finalize_updates(updates)
        if self.crew.value is not None:
            with self.timed("value", "update", step=step):
                metrics |= finalize_value(self.crew.value.finish_training(pending))
        metrics["algo/rows"] = float(plan.rows)
        metrics["perf/update_s"] = time.perf_counter() - started
        metrics["perf/update_tokens_per_s"] = plan.packed_tokens * passes / metrics["perf/update_s"]
        return metrics

    def judge(self, plan: StepPlan, harvest: Harvest) -> tuple[StepPlan, dict[str, float], list]:
        """Advantages and returns from the value model as it is before the step, and its updates set off."""
        value = self.cfg.value
        plan, metrics = with_values(
            plan,
            harvest.trajectories,
            harvest.advantages,
            self.crew.value.score(plan),
            gamma=value.gamma,
            lam=value.lam,
            shrink=self.cfg.algo.shrink,
            gate=value.gate,
            stepwise=value.step_rewards,
        )
        return plan, metrics, self.crew.value.start_training(plan)

    def publish(self) -> dict[str, float]:
        """The learner's weights to every rollout worker; ends with version and checksum equality on all of them, in mode async
        perhaps after this returns. Then more prompts may be begun."""
        self.turns.send()
        with self.timed("weights", f"version {self.step}"):
            metrics = self.crew.sync.publish(self.step, wait=self.feed.max_lag == 0)
        self.turns.to_rollouts()
        self.feed.publish(self.step)
        return metrics

    def account(self, harvest: Harvest, metrics: dict[str, float], seconds: float) -> None:
        """What the summary needs, and the step's own cost."""
        state = self.state
        state["parity_max_abs_delta"] = max(state["parity_max_abs_delta"], metrics.get("parity/max_abs_delta", 0.0))
        state["tokens"] += harvest.tokens
        state["seconds"] += seconds
        metrics |= self.checkpoints.metrics()
        if self.crew.servers is not None:
            metrics |= self.crew.servers.metrics()
        metrics["perf/step_s"] = seconds

    def evaluate(self, metrics: dict[str, float]) -> dict[str, float]:
        """`metrics` with held-out accuracy added: `eval/accuracy` under the rollout's decoder, `eval/other` under another."""
        started, prompts = time.perf_counter(), self.source.test_prompts(self.cfg.eval.prompts)
        pools, samples = (self.crew.rollouts, self.crew.verifiers), self.cfg.eval.samples
        decoders = {"accuracy": self.cfg.rollout.decoder, "other": decoder_of_eval(self.cfg)}
        with self.timed("driver", "evaluation", step=self.step):
            for name, decoder in decoders.items():
                metrics |= evaluate(*pools, prompts, decoder, samples, name)
            if self.cfg.eval.hex:
                metrics |= evaluate_hex(*pools, prompts, self.cfg.rollout.decoder, samples, self.cfg.eval.hex)
        metrics["perf/eval_s"] = time.perf_counter() - started
        self.state["eval_last"], self.state["eval_last_step"] = metrics["eval/accuracy"], self.step
        return metrics

    def evaluate_at_start(self) -> None:
        metrics = self.evaluate({})
        self.state["eval_start"] = self.beginning["eval_start"] = metrics["eval/accuracy"]
        self.monitor.log(self.step, metrics)

    def report(self, harvest: Harvest, metrics: dict[str, float]) -> None:
        self.monitor.memory(self.crew.usage())
        self.monitor.prompts(self.step, harvest.record)
        self.monitor.log(self.step, metrics, harvest.lags)
        if self.cfg.monitor.samples:
            self.monitor.samples(self.step, harvest.sample_rows(self.cfg.monitor.samples, self.crew.rollouts))

    def due(self, every: int) -> bool:
        return self.step == self.cfg.steps or (every > 0 and self.step % every == 0)

    def save(self) -> None:
        """Policy, optimizer, step, W&B run, and the prompts' fates; generators are functions of seed and step, so they need no
        state. What is written in the background is complete before the next one begins."""
        own = {"monitor": self.monitor.state(), "fingerprint": fingerprint(self.cfg)}
        self.turns.to_learner()
        with self.timed("checkpoint", f"step {self.step}"):
            self.checkpoints.save(self.step, self.state | self.feed.state() | own, self.crew.trained)

    def resume(self) -> None:
        """Continue from a checkpoint, if the run was given one."""
        if self.resume_from is not None:
            self.restore(self.checkpoints.restore(self.crew.trained, self.resume_from))
            self.monitor.note(f"resumed from {self.resume_from} at step {self.step}")
            if self.step < self.monitor.last_step:  # that checkpoint was damaged, and the one before was taken
                self.monitor.rewind(self.step, f"{self.resume_from} is damaged")

    def restore(self, saved: dict[str, Any]) -> None:
        self.state = {key: saved[key] for key in (*self.state, "eval_last", "eval_last_step") if key in saved}
        self.feed.restore(saved, self.step)

    def recover(self, error: LearnerLost) -> None:
        """All ranks anew from the last checkpoint, and the run goes on from there. Raises the error when that was needed too
        often, Interrupted if the run was asked to end: without its ranks there is nothing to save."""
        self.restarts += 1
        if self.restarts > self.cfg.learner.restarts:
            raise LearnerLost(f"the learner was lost {self.restarts} times (limit learner.restarts); last: {error}") from error
        self.monitor.warn(f"learner lost ({self.restarts} of at most {self.cfg.learner.restarts} times): {error}")
        interruption.check()
        try:
            if self.turns.shared:
                self.crew.rollouts.sleep()
            for group in self.crew.trained:
                group.restart()
            self.crew.sync.forget()
            newest = self.checkpoints.newest()
            saved = self.beginning if newest is None else self.checkpoints.restore(self.crew.trained, newest)
        except LearnerLost as again:
            return self.recover(again)
        self.restore(saved)
        self.monitor.rewind(self.step, f"fresh ranks from {newest or 'the initial weights'}")

    def leave(self, error: Interrupted) -> None:
        """Save the last finished step, for whoever continues. What cannot be saved is a warning: the run ends because it was
        asked to."""
        self.monitor.incident("interruption", f"{error}; the run leaves after step {self.step}")
        self.feed.abandon()  # whoever shares the learner's GPU gives way at once
        try:
            if self.step > 0:
                self.save()
            self.checkpoints.finish()
        except (LearnerLost, CheckpointError) as lost:  # whoever takes the driver's machine takes others as well
            self.monitor.warn(f"step {self.step} is not saved: {lost}. A resumed run goes on from the checkpoint before")

    def summary(self) -> dict[str, Any]:
        state = self.state
        return {
            "recipe": self.cfg.name,
            "seed": self.cfg.seed,
            "steps": state["step"],
            "eval_start": state["eval_start"],
            "eval_final": state.get("eval_last"),
            "seconds": state["seconds"],
            "tokens_per_s": state["tokens"] / state["seconds"] if state["seconds"] else 0.0,
            "parity_max_abs_delta": state["parity_max_abs_delta"],
            "parameters": self.crew.learner.parameters,
        }

    def close(self) -> None:
        """End the workers, once what is being written is on the disk; safe after any failure."""
        self.checkpoints.close()
        self.crew.close()
