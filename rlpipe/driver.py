"""The training loop: the one process that knows all of it.

prompts → rollouts → rewards → advantages → rows → update → weights, once a step. Nothing flows back but weights.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlpipe import checkpoint, parity
from rlpipe.cluster import Placement
from rlpipe.collection import Collector, Harvest
from rlpipe.config import RunConfig
from rlpipe.evaluation.training import evaluate, evaluate_hex
from rlpipe.learner.credit import finalize_value, with_values
from rlpipe.learner.group import LearnerGroup, RankGroup, ValueGroup
from rlpipe.learner.step import StepPlan, draws_and_passes, plan_step
from rlpipe.monitor.monitor import Monitor
from rlpipe.objectives.objective import build_objective
from rlpipe.recipe import decoder_of_eval, fingerprint
from rlpipe.rollout.pool import RolloutPool, WeightUpdate
from rlpipe.verifiers.pool import VerifierPool

log = logging.getLogger("rlpipe")

SHUFFLE = 0x5EED  # stream of the per-step generator that deals trajectories to updates


class Driver:
    """One run, from its first weights to its summary. `state` is what a checkpoint must carry besides the learner."""

    def __init__(
        self,
        cfg: RunConfig,
        run_dir: Path,
        monitor: Monitor,
        source: Any,
        cursor: Any,
        model_folder: str,
        placement: Placement,
        resume_from: Path | None = None,
    ):
        self.cfg, self.run_dir, self.monitor = cfg, run_dir, monitor
        self.source, self.cursor = source, cursor
        self.objective = build_objective(cfg.algo, cfg.rollout.decoder.max_tokens)
        self.resume_from = resume_from
        self.state: dict[str, Any] = {
            "step": 0,
            "eval_start": None,
            "parity_max_abs_delta": 0.0,
            "tokens": 0,
            "seconds": 0.0,
        }
        monitor.note("starting the workers")
        self.learner = LearnerGroup(cfg, model_folder, placement)
        self.value = ValueGroup(cfg, model_folder, placement) if cfg.value.enabled else None
        self.rollouts = RolloutPool(cfg, model_folder, placement)
        self.verifiers = VerifierPool(cfg.verifier, source.verifier, placement)
        self.collector = Collector(cfg, cursor, self.rollouts, self.verifiers, self.objective, monitor)

    @property
    def step(self) -> int:
        return self.state["step"]

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the summary. Failures leave the last checkpoint and reach the caller."""
        self.resume()
        self.sync_weights()
        if self.step == 0:
            self.state["eval_start"] = self.evaluate_and_log({})["eval/accuracy"]
        while self.step < self.cfg.steps:
            started = time.perf_counter()
            self.state["step"] += 1
            harvest = self.collector.collect(self.step)
            metrics = harvest.metrics | self.learn(harvest)
            self.sync_weights()
            self.account(harvest, metrics, time.perf_counter() - started)
            if self.due(self.cfg.eval.every):
                metrics = self.evaluate(metrics)
            self.report(harvest, metrics)
            if self.due(self.cfg.checkpoint.every):
                self.save()
        return self.summary()

    def learn(self, harvest: Harvest) -> dict[str, float]:
        """Rows, advantages, the optimizer updates, and the parity gauge that they are checked by."""
        algo, started = self.cfg.algo, time.perf_counter()
        draws, passes = draws_and_passes(algo)
        plan = plan_step(
            harvest.trajectories,
            harvest.advantages,
            self.objective,
            updates=algo.updates_per_step,
            gauge_trajectories=self.cfg.parity.trajectories,
            rng=np.random.default_rng([self.cfg.seed, self.step, SHUFFLE]),
            draws=draws,
        )
        metrics: dict[str, float] = {}
        if self.value is not None:
            plan, metrics, pending = self.judge(plan, harvest)
        updates, (learner, rollout, exact) = self.learner.train(plan)
        metrics |= parity.gauge(learner[exact], rollout[exact], algo.clip_low, algo.clip_high)
        metrics |= parity.gap(learner[~exact], rollout[~exact])
        metrics["parity/group_diversity"] = parity.diversity([group.texts for group in harvest.groups])
        parity.check(metrics, self.cfg.parity, self.step)
        metrics |= self.objective.finalize_updates(updates)
        if self.value is not None:
            metrics |= finalize_value(self.value.finish_training(pending))
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
            self.value.score(plan),
            gamma=value.gamma,
            lam=value.lam,
            shrink=self.cfg.algo.shrink,
            gate=value.gate,
            stepwise=value.step_rewards,
        )
        return plan, metrics, self.value.start_training(plan)

    def sync_weights(self) -> None:
        """The learner's weights to every rollout worker; ends with version and checksum equality on all of them."""
        started = time.perf_counter()
        manifest, buckets = self.learner.export(self.step)
        self.rollouts.update_weights(WeightUpdate(manifest, tuple(buckets)))
        self.sync_s = time.perf_counter() - started

    def account(self, harvest: Harvest, metrics: dict[str, float], seconds: float) -> None:
        """What the summary needs, and the step's own cost."""
        state = self.state
        state["parity_max_abs_delta"] = max(state["parity_max_abs_delta"], metrics.get("parity/max_abs_delta", 0.0))
        state["tokens"] += harvest.tokens
        state["seconds"] += seconds
        metrics["perf/sync_s"], metrics["perf/step_s"] = self.sync_s, seconds
        metrics["perf/restarts"] = float(self.rollouts.pool.restarts + self.verifiers.pool.restarts)

    def evaluate(self, metrics: dict[str, float]) -> dict[str, float]:
        """`metrics` with held-out accuracy added: `eval/accuracy` under the rollout's decoder, `eval/other` under another."""
        started, prompts = time.perf_counter(), self.source.test_prompts(self.cfg.eval.prompts)
        decoders = {"accuracy": self.cfg.rollout.decoder, "other": decoder_of_eval(self.cfg)}
        for name, decoder in decoders.items():
            metrics |= evaluate(self.rollouts, self.verifiers, prompts, decoder, self.cfg.eval.samples, name)
        if self.cfg.eval.hex:
            vote = (self.cfg.rollout.decoder, self.cfg.eval.samples, self.cfg.eval.hex)
            metrics |= evaluate_hex(self.rollouts, self.verifiers, prompts, *vote)
        metrics["perf/eval_s"] = time.perf_counter() - started
        self.state["eval_last"], self.state["eval_last_step"] = metrics["eval/accuracy"], self.step
        return metrics

    def evaluate_and_log(self, metrics: dict[str, float]) -> dict[str, float]:
        metrics = self.evaluate(metrics)
        self.monitor.log(self.step, metrics)
        return metrics

    def report(self, harvest: Harvest, metrics: dict[str, float]) -> None:
        self.monitor.log(self.step, metrics)
        if self.cfg.monitor.samples:
            self.monitor.samples(self.step, harvest.sample_rows(self.cfg.monitor.samples, self.rollouts))

    def due(self, every: int) -> bool:
        return self.step == self.cfg.steps or (every > 0 and self.step % every == 0)

    def save(self) -> None:
        """Policy, optimizer, cursor, step and W&B run; the generators are functions of seed and step, so they need no state."""
        cfg = self.cfg
        state = self.state | {
            "cursor": self.cursor.state(),
            "monitor": self.monitor.state(),
            "fingerprint": fingerprint(cfg),
            "learner": self.shape(),
        }
        folder = checkpoint.write(self.run_dir, self.step, state, self.save_weights, cfg.checkpoint.keep)
        log.info("checkpoint of step %d in %s", self.step, folder)

    def save_weights(self, folder: str) -> None:
        for group in self.trained():
            group.save(folder)

    def trained(self) -> list[RankGroup]:
        """The models that learn."""
        return [self.learner] if self.value is None else [self.learner, self.value]

    def resume(self) -> None:
        """Continue from a checkpoint, if the run was given one."""
        if self.resume_from is None:
            return
        saved = checkpoint.read_state(self.resume_from)
        for group in self.trained():
            group.load(str(self.resume_from))
        self.cursor.restore(saved["cursor"])
        self.state = {k: v for k, v in saved.items() if k not in ("cursor", "monitor", "fingerprint", "learner")}
        self.monitor.note(f"resumed from {self.resume_from} at step {self.step}")

    def shape(self) -> dict[str, int]:
        return {"workers": self.cfg.learner.workers, "zero_stage": self.cfg.learner.zero_stage}

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
            "parameters": self.learner.parameters,
        }

    def close(self) -> None:
        """End the workers; safe after any failure."""
        self.rollouts.close()
        self.verifiers.close()
        for group in self.trained():
            group.close()
