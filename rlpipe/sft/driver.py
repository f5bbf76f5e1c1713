"""The supervised loop: examples → rows → update, once a step, and a held-out loss in between."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlpipe import interruption
from rlpipe.checkpoint import Checkpoints
from rlpipe.cluster import Placement
from rlpipe.config import AlgoConfig, RunConfig
from rlpipe.errors import ConfigError, Interrupted
from rlpipe.learner.group import LearnerGroup
from rlpipe.learner.step import StepPlan, plan_step
from rlpipe.monitor.monitor import Monitor
from rlpipe.objectives.objective import Objective, build_objective
from rlpipe.objectives.supervised import supervised_settings
from rlpipe.recipe import fingerprint
from rlpipe.sft.examples import Examples
from rlpipe.trajectory import Trajectory

MASKS, HELD_OUT = 0x3A5C, 0x0E1D  # streams of the generators that mask training rows and held-out rows
KEPT = {"loss": "loss", "nll": "policy_loss", "grad_norm": "grad_norm", "lr": "lr", "tokens": "scored_tokens"}


def learner_config(cfg: RunConfig) -> RunConfig:
    """The configuration that the learner's ranks are given: the supervised objective as its `algo`, probabilities at
    temperature 1. Raises ConfigError for numbers that the objective does not have."""
    algo = AlgoConfig(**supervised_settings(cfg.sft.objective, cfg.sft.options))
    decoder = dataclasses.replace(cfg.rollout.decoder, temperature=1.0)
    try:
        build_objective(algo)
    except ConfigError as error:
        said = str(error).replace("algo.options", "sft.options").replace("algo.shrink", "sft.options.shrink")
        raise ConfigError(said.replace(f"preset {algo.preset}", f"sft.objective={cfg.sft.objective}")) from error
    return dataclasses.replace(cfg, algo=algo, rollout=dataclasses.replace(cfg.rollout, decoder=decoder))


def plan_update(trajectories: Sequence[Trajectory], objective: Objective, rng: np.random.Generator) -> StepPlan:
    """One optimizer update on all of them; its weights add up to 1 before the first backward pass."""
    return plan_step(
        trajectories, np.ones(len(trajectories), np.float32), objective, updates=1, gauge_trajectories=0, rng=rng
    )  # fmt: skip


class SftDriver:
    """One run, from its first weights to its summary. `state` is what a checkpoint must carry besides the learner."""

    def __init__(
        self,
        cfg: RunConfig,
        run_dir: Path,
        monitor: Monitor,
        examples: Examples,
        model_folder: str,
        placement: Placement,
        resume_from: Path | None = None,
    ):
        self.cfg, self.run_dir, self.monitor, self.examples = cfg, run_dir, monitor, examples
        self.resume_from = resume_from
        settings = learner_config(cfg)
        self.objective = build_objective(settings.algo, cfg.rollout.decoder.max_tokens)
        rng = np.random.default_rng([cfg.seed, HELD_OUT])
        self.held_out = plan_update(examples.held_out, self.objective, rng) if examples.held_out else None
        self.state: dict[str, Any] = {"step": 0, "held_out_start": None, "held_out_last": None, "tokens": 0, "seconds": 0.0}
        self.checkpoints = Checkpoints(
            cfg.checkpoint,
            run_dir,
            warn=monitor.warn,
            note=monitor.note,
            completed=self.point_model,
            timeout_s=cfg.learner.timeout_s,
        )
        monitor.note("starting the learner")
        self.learner = LearnerGroup(settings, model_folder, placement)

    @property
    def step(self) -> int:
        return self.state["step"]

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the summary. Failures leave the last checkpoint and reach the caller."""
        self.resume()
        if self.step == 0 and self.held_out is not None:
            metrics = self.evaluate()
            self.state["held_out_start"] = metrics["eval/loss"]
            self.monitor.log(0, metrics)
        while self.step < self.cfg.steps:
            self.leave_if_asked()
            self.state["step"] += 1
            metrics = self.update()
            if self.held_out is not None and self.due(self.cfg.eval.every):
                metrics |= self.evaluate()
            self.monitor.log(self.step, metrics)
            if self.due(self.cfg.checkpoint.every):
                self.save()
        self.checkpoints.finish()
        return self.summary()

    def update(self) -> dict[str, float]:
        """One optimizer update on the next examples."""
        started = time.perf_counter()
        batch = self.examples.take(self.cfg.sft.batch_size)
        plan = plan_update(batch, self.objective, np.random.default_rng([self.cfg.seed, self.step, MASKS]))
        updates, _ = self.learner.train(plan)
        found = self.objective.finalize_updates(updates)
        metrics = {f"sft/{name}": found[f"algo/{key}"] for name, key in KEPT.items() if f"algo/{key}" in found}
        if self.objective.certainty is not None:
            metrics["sft/certainty"] = float(updates[0]["sums"]["certainty_loss"])
        else:
            metrics["sft/entropy"] = found["algo/entropy"]
        if self.cfg.data.bad_records == "skip":
            metrics["sft/left_out"] = float(self.examples.left_out)
        seconds = time.perf_counter() - started
        metrics |= {"perf/step_s": seconds} | self.checkpoints.metrics()
        metrics["perf/update_tokens_per_s"] = plan.packed_tokens / seconds
        self.state["tokens"] += sum(example.valid_len for example in batch)
        self.state["seconds"] += seconds
        return metrics

    def evaluate(self) -> dict[str, float]:
        """eval/loss: the objective's loss per token on the held-out examples, always under the same masks."""
        started = time.perf_counter()
        logp = self.learner.score(self.held_out)
        loss = -sum(
            float((sample.policy_weight.astype(np.float64) * scores).sum())
            for sample, scores in zip(self.held_out.samples, logp, strict=True)
        )
        self.state["held_out_last"] = loss
        return {"eval/loss": loss, "perf/eval_s": time.perf_counter() - started}

    def due(self, every: int) -> bool:
        return self.step == self.cfg.steps or (every > 0 and self.step % every == 0)

    def save(self) -> None:
        """Policy, optimizer, place in the data, step and W&B run."""
        state = self.state | {
            "cursor": self.examples.state(),
            "monitor": self.monitor.state(),
            "fingerprint": fingerprint(self.cfg),
        }
        self.checkpoints.save(self.step, state, [self.learner])

    def leave_if_asked(self) -> None:
        """Between two steps: if the process was asked to end, save the last finished one and raise Interrupted."""
        try:
            interruption.check()
        except Interrupted:
            if self.step > 0:
                self.save()
            self.checkpoints.finish()
            raise

    def point_model(self, folder: Path) -> None:
        """`RUN/model` leads to the weights of the newest complete checkpoint."""
        link = self.run_dir / "model.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("checkpoints") / folder.name / "model")
        os.replace(link, self.run_dir / "model")

    def resume(self) -> None:
        """Continue from a checkpoint, if the run was given one."""
        if self.resume_from is None:
            return
        saved = self.checkpoints.restore([self.learner], self.resume_from)
        self.examples.restore(saved["cursor"])
        self.state = {name: saved[name] for name in self.state}
        self.monitor.note(f"resumed from {self.resume_from} at step {self.step}")

    def summary(self) -> dict[str, Any]:
        state = self.state
        return {
            "recipe": self.cfg.name,
            "seed": self.cfg.seed,
            "objective": self.cfg.sft.objective,
            "steps": state["step"],
            "held_out_start": state["held_out_start"],
            "held_out_final": state["held_out_last"],
            "seconds": state["seconds"],
            "tokens_per_s": state["tokens"] / state["seconds"] if state["seconds"] else 0.0,
            "parameters": self.learner.parameters,
            "model": str(self.run_dir / "model"),
        }

    def close(self) -> None:
        """End the workers; safe after any failure."""
        self.checkpoints.close()
        self.learner.close()
