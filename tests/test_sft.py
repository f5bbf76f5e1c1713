"""The supervised run: its loss falls, ranks and resuming change nothing, what it leaves, its commands."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_conversion import causal

from rlpipe.config import ModelConfig, RunConfig
from rlpipe.contradictions import check as check_contradictions
from rlpipe.errors import ConfigError
from rlpipe.sft import training
from rlpipe.sft.plan import describe
from rlpipe.sft.training import check, with_epochs

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parent.parent


def configuration(folder: Path, **sft) -> RunConfig:
    cfg = RunConfig(name="sft_test", output_dir=str(folder), steps=6)
    cfg.model = ModelConfig(layers=2, width=32, heads=2, mlp=64)
    cfg.sft = dataclasses.replace(cfg.sft, batch_size=12, held_out=8, **sft)
    cfg.learner = dataclasses.replace(cfg.learner, lr=3e-3, betas=[0.9, 0.95], threads=1, token_budget=256)
    cfg.eval.every, cfg.checkpoint.every, cfg.monitor.wandb = 3, 3, "disabled"
    return cfg


def drive(cfg: RunConfig, run_dir: Path, resume_from: Path | None = None) -> tuple[list[dict], dict[str, np.ndarray], dict]:
    """(metrics, weights, summary) of a run in this process's Ray."""
    from rlpipe import cluster, recipe
    from rlpipe.data.registry import build_source
    from rlpipe.models.loading import load_model
    from rlpipe.monitor.metrics import read_metrics
    from rlpipe.monitor.monitor import Monitor
    from rlpipe.plan import roles
    from rlpipe.sft.driver import SftDriver
    from rlpipe.sft.training import _examples
    from rlpipe.warm_start import initial_model

    source = build_source(cfg.data, cfg.seed)
    folder = initial_model(cfg, source)
    state = {"step": int(resume_from.name[-6:]), "wandb_id": None} if resume_from else None
    monitor = Monitor(
        run_dir, cfg, config_yaml=recipe.to_yaml(cfg), resume=state, stream=(run_dir.parent / "console").open("a")
    )
    placement = cluster.place([role for role in roles(cfg) if role.name == "learner"], 120.0)
    driver = SftDriver(cfg, run_dir, monitor, _examples(cfg, source, folder), str(folder), placement, resume_from)
    try:
        summary = driver.run()
        monitor.finish(summary, status="finished")
    finally:
        driver.close()
        placement.remove()
    model = load_model(run_dir / "model")
    lines = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(run_dir / "metrics.jsonl")]
    return lines, {name: p.detach().numpy() for name, p in model.lm.named_parameters()}, summary


@pytest.fixture(scope="module")
def whole(ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, drive(configuration(folder), folder / "run")


def test_the_loss_falls_and_the_model_is_left_where_the_next_run_finds_it(whole):
    folder, (lines, _, summary) = whole
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 3, 6]
    assert summary["held_out_final"] < 0.9 * summary["held_out_start"]
    assert lines[6]["sft/loss"] < lines[1]["sft/loss"]
    assert (folder / "run" / "model" / "config.json").is_file()
    assert "Loss, nats a token" in (folder / "run" / "report.html").read_text()
    assert "nats a token before" in (folder / "console").read_text()


def test_two_ranks_make_the_same_updates_as_one(whole, tmp_path):
    _, (lines, weights, _) = whole
    cfg = configuration(tmp_path)
    cfg.learner = dataclasses.replace(cfg.learner, workers=2, zero_stage=2)
    other_lines, other, _ = drive(cfg, tmp_path / "run")
    for one, two in zip(lines, other_lines, strict=True):
        assert two == pytest.approx(one, abs=2e-4, rel=2e-3)
    assert max(np.abs(weights[name] - other[name]).max() for name in weights) < 2e-4


def test_a_resumed_run_goes_on_bit_for_bit(whole, tmp_path):
    from rlpipe import checkpoint

    _, (lines, weights, _) = whole
    cfg = configuration(tmp_path)
    drive(dataclasses.replace(cfg, steps=3), tmp_path / "run")
    again, resumed, _ = drive(cfg, tmp_path / "run", checkpoint.complete(tmp_path / "run")[-1])
    assert again == lines
    assert all(np.array_equal(weights[name], resumed[name]) for name in weights)


def test_certainty_with_adapters_on_full_attention(ray_session, tmp_path):
    cfg = configuration(tmp_path, objective="certainty", options={"size": 8})
    cfg.model = dataclasses.replace(cfg.model, path="tiny:full")
    cfg.learner = dataclasses.replace(cfg.learner, lora_rank=4, lr=2e-2)
    lines, _, _ = drive(dataclasses.replace(cfg, steps=4), tmp_path / "run")
    for line in lines[1:]:
        assert line["sft/loss"] == pytest.approx(line["sft/nll"] + line["sft/certainty"], abs=1e-5)
        assert line["sft/certainty"] > 0
    assert lines[4]["sft/nll"] < lines[1]["sft/nll"]


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, "-m", "rlpipe.sft", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_convert_then_train_from_the_command_line(tmp_path):
    """A causal LM is converted, adapted on a file of demonstrations, and the report, checkpoint and link are there."""
    causal(tmp_path / "ar")
    done = command("convert", f"from={tmp_path / 'ar'}", f"to={tmp_path / 'block'}", "block_size=4")
    assert done.returncode == 0 and "mask_token_id" in done.stdout, done.stderr
    records = [{"prompt": f"{i}+1 ", "answer": str(i + 1), "demonstration": str(i + 1)} for i in range(60)]
    for name, part in (("train", records[:50]), ("test", records[50:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in part))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model: {{path: {tmp_path / 'block'}}}\n"
        f"data: {{task: jsonl, train: {tmp_path / 'train.jsonl'}, test: {tmp_path / 'test.jsonl'}}}\n"
        "rollout: {decoder: {max_tokens: 8}}\nsft: {objective: block, batch_size: 10, epochs: 2, held_out: 10}\n"
        "learner: {lr: 1.0e-2, threads: 1}\neval: {every: 5}\nmonitor: {wandb: disabled}\ncluster: {address: local}\n"
    )
    done = command(f"recipe={recipe}", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished: 10 steps" in done.stdout and "held-out loss" in done.stdout
    run = tmp_path / "out" / "mine" / "latest"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out_final"] < summary["held_out_start"]
    assert (run / "model" / "config.json").is_file() and (run / "report.html").is_file()
    done = command(f"recipe={recipe}", f"output_dir={tmp_path / 'out'}", "resume=auto")
    assert done.returncode == 0 and "is finished" in done.stdout


@pytest.mark.slow
def test_a_model_learns_from_the_trajectories_that_it_recorded(tmp_path):
    common = [
        "recipe=quickstart", "warm_start.steps=150", "data.options={careless: 0.0}", f"output_dir={tmp_path}",
        "monitor.wandb=disabled", "cluster.address=local",
    ]  # fmt: skip
    done = command("collect", *common, f"to={tmp_path / 'own.npz'}", "prompts=24", "keep=1")
    assert done.returncode == 0 and "responses, for" in done.stdout, done.stderr
    for objective in ("trace", "certainty"):
        own = [f"name={objective}", f"sft.objective={objective}", f"sft.trajectories={tmp_path / 'own.npz'}", "steps=6"]
        done = command(*common, *own, "sft.held_out=16", "eval.every=2")
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (tmp_path / objective / "latest" / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["sft/loss"] for line in lines[1:]]
        assert len(losses) == 6 and np.mean(losses[-2:]) < np.mean(losses[:2])


def test_wrong_commands_say_what_is_right(tmp_path):
    for arguments, said in (
        (["konvert"], "did you mean convert"),
        (["convert", "to=x"], "from=FOLDER to=FOLDER"),
        (["convert", "from=a", "to=b", "size=4"], "size: there is no such setting"),
        (["collect", "recipe=quickstart", "to=x.jsonl"], "must end in .npz"),
        (["collect", "recipe=quickstart", "to=x.npz", "prompts=many"], "prompts=many"),
        (["convert", f"from={tmp_path}", f"to={tmp_path / 'x'}"], "config.json"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_what_supervised_training_cannot_do_is_refused_and_what_it_does_not_heed_is_said(tmp_path):
    cfg = configuration(tmp_path)
    check_contradictions(cfg)
    assert check(cfg) == []
    cfg.algo.kl_coef, cfg.value.enabled = 0.1, True
    (warning,) = check(cfg)
    assert "algo.kl_coef, value.enabled" in warning
    cfg.warm_start.steps = 5
    assert "warm_start.steps=5: it trains on demonstrations that eval/loss may hold out" in check(cfg)[1]
    with pytest.raises(ConfigError, match="sft.trajectories=FILE"):
        check(configuration(tmp_path, objective="trace"))
    wrong = configuration(tmp_path, objective="blok")
    with pytest.raises(ConfigError, match="sft.objective=blok.*block"):
        check_contradictions(wrong)
    with pytest.raises(ConfigError, match="no end to count passes by"):
        with_epochs(configuration(tmp_path, epochs=2), None)
    assert with_epochs(configuration(tmp_path, epochs=2), 30).steps == 5


@pytest.mark.parametrize("path", ["tiny:block", "convert"])
def test_epochs_are_passes_over_what_is_not_held_out(tmp_path, monkeypatch, path):
    if path == "convert":
        causal(tmp_path / "ar")
        path = f"convert:{tmp_path / 'ar'}"
    lines = [{"prompt": f"{i}", "response": "12", "step_map": [1, 2]} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = [json.dumps({"prompt": f"{i}", "answer": "1", "demonstration": "1"}) for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(records))
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "x", "answer": "1"}))
    steps = []
    monkeypatch.setattr(
        training, "train", lambda cfg, source, run, resume, warnings, examples: steps.append((cfg.steps, examples))
    )
    common = [
        f"model.path={path}",
        "sft.epochs=3",
        "sft.batch_size=4",
        "sft.held_out=5",
        f"output_dir={tmp_path / 'out'}",
        "name=e",
    ]
    data = ["data.task=records", f"data.train={tmp_path / 'train.jsonl'}", f"data.test={tmp_path / 'test.jsonl'}"]
    training.run(["recipe=quickstart", "warm_start.steps=0", "rollout.decoder.max_tokens=8", "data.options={}", *common, *data])
    training.run(
        [
            "recipe=quickstart",
            "warm_start.steps=0",
            *common,
            "sft.objective=trace",
            f"sft.trajectories={tmp_path / 'own.jsonl'}",
        ]
    )
    (demonstrated, some), (recorded, others) = steps
    assert some.size == 35 and demonstrated == 27  # 3 × 35 / 4
    assert others.size + len(others.held_out) == 40 and recorded == -(-3 * others.size // 4) < 30


def test_a_plan_names_the_objective_and_its_learner(tmp_path):
    text = describe(configuration(tmp_path, objective="certainty"))
    assert "objective certainty" in text and "entropy_weight=2.0" in text and "learner" in text
