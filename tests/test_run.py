"""The command a user types, as a process: what it leaves, and what survives kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_conversion import causal

from rlpipe import recipe, run

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent
SMALL = [
    "recipe=quickstart", "steps=6", "eval.every=3", "eval.prompts=16", "checkpoint.every=2", "warm_start.steps=8",
    "model.layers=2", "model.width=32", "model.heads=2", "model.mlp=64", "algo.prompts_per_step=6",
    "algo.samples_per_prompt=4", "rollout.batch_size=8", f"verifier.name={HERE / 'clue_verifier.py'}:share",
    "monitor.wandb=offline", "monitor.samples=2", "cluster.address=local", "learner.threads=1",
]  # fmt: skip


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    """`python -m rlpipe.run` with its outputs in `folder`; the console goes to console.txt there."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    console = (folder / "console.txt").open("a")
    command = [sys.executable, "-m", "rlpipe.run", *SMALL, f"output_dir={folder}", *overrides]
    return subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=console, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, folder: Path) -> Path:
    """Wait for exit 0; returns the run's folder."""
    code = process.wait(timeout=400)
    assert code == 0, (folder / "console.txt").read_text()[-3000:]
    return (folder / "quickstart" / "latest").resolve()


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what measures time, machines and faults."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "cluster/"))} for line in lines]


def weights(run: Path, step: int = 6) -> bytes:
    return (run / "checkpoints" / f"step_{step:06d}" / "model" / "model.safetensors").read_bytes()


def wait_for_step(folder: Path, process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob("quickstart/2*/metrics.jsonl"):
            if any(json.loads(line)["step"] >= step for line in path.read_text().splitlines() if line.endswith("}")):
                return
        time.sleep(0.05)
    pytest.fail(f"step {step} never came:\n" + (folder / "console.txt").read_text()[-3000:])


def tree(process: subprocess.Popen) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def kill_everything(process: subprocess.Popen) -> None:
    for victim in tree(process):
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(timeout=30)


def title(process: psutil.Process) -> str:
    """What Ray calls a worker: 'ray::RolloutWorker.generate', say; empty for one that is gone."""
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("baseline")
    return finish(start(folder), folder)


def test_what_a_run_leaves(baseline):
    names = {path.name for path in baseline.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "checkpoints", "trajectories"} <= names
    lines = metrics(baseline)
    assert [line["step"] for line in lines] == list(range(7))
    sections = {key.split("/")[0] for line in lines for key in line} - {"step"}
    assert sections == {"reward", "rollout", "algo", "parity", "eval"}
    assert all(line["parity/max_abs_delta"] <= 1e-4 for line in lines[1:])
    assert "reward/digits" in lines[1]  # a verifier's parts are logged apart
    assert [i for i, line in enumerate(lines) if "eval/accuracy" in line] == [0, 3, 6]
    summary = json.loads((baseline / "summary.json").read_text())
    wanted = {"eval_start", "eval_final", "steps", "seconds", "tokens_per_s", "parity_max_abs_delta"}
    assert wanted <= summary.keys() and summary["steps"] == 6
    assert summary["parity_max_abs_delta"] <= 1e-4
    kept = sorted(path.name for path in (baseline / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006"]
    console = (baseline.parent.parent / "console.txt").read_text()
    assert "careless" in console, "the console says what the warm start was fed"


def test_the_exported_model_loads_and_is_not_the_initial_one(baseline):
    from rlpipe.models.loading import load_model, load_tokenizer

    folder = baseline / "checkpoints" / "step_000006" / "model"
    model = load_model(folder)
    initial = load_model(next((baseline.parent.parent / "cache").glob("initial-*")))
    assert load_tokenizer(folder).mask_token_id == model.spec.mask_token_id
    assert any((a != b).any() for a, b in zip(model.parameters(), initial.parameters(), strict=True))


def test_killed_workers_change_nothing(baseline, tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, process, 1)
    killed = []
    for name in ("RolloutWorker", "VerifierWorker"):
        victims = [p for p in tree(process) if f"ray::{name}" in title(p)]
        assert victims, f"no {name} found among the run's processes"
        victims[0].send_signal(signal.SIGKILL)
        killed.append(victims[0].pid)
    run = finish(process, tmp_path)
    assert metrics(run) == metrics(baseline)
    assert weights(run) == weights(baseline)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["cluster/restarts"] >= 1, f"killed {killed}, but nothing was restarted"


def test_kill_everything_and_resume_is_bit_identical(baseline, tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, process, 3)
    kill_everything(process)
    first = (tmp_path / "quickstart" / "latest").resolve()
    run = finish(start(tmp_path, "resume=auto"), tmp_path)
    assert run == first, "resume=auto continues the same run"
    assert metrics(run) == metrics(baseline)
    assert weights(run) == weights(baseline)
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (run, baseline))
    for key in ("eval_start", "eval_final", "steps", "parity_max_abs_delta"):
        assert ours[key] == theirs[key]

    done = start(tmp_path, "resume=auto")
    assert done.wait(timeout=100) == 0
    assert "finished" in (tmp_path / "console.txt").read_text().splitlines()[-1]
    refused = start(tmp_path, "resume=auto", "steps=8", "learner.lr=0.1")
    assert refused.wait(timeout=100) == 1
    assert "learner.lr" in (tmp_path / "console.txt").read_text().split("finished")[-1]


def test_async_without_lag_is_sync_to_the_bit(baseline, tmp_path):
    run = finish(start(tmp_path, "mode=async", "max_lag=0", "rollout.workers=3"), tmp_path)
    assert metrics(run) == metrics(baseline)
    assert weights(run) == weights(baseline)
    assert (run / "prompts.jsonl").read_bytes() == (baseline / "prompts.jsonl").read_bytes()


def test_roles_that_take_turns_give_the_same_run(baseline, tmp_path):
    run = finish(start(tmp_path, "cluster.colocate=[rollout,learner]", "rollout.workers=1"), tmp_path)
    assert metrics(run) == metrics(baseline)
    assert weights(run) == weights(baseline)


def test_with_lag_the_bound_holds_and_every_prompt_has_one_fate(tmp_path):
    run = finish(start(tmp_path, "mode=async", "max_lag=2", "steps=8", "rollout.workers=3", "checkpoint.every=1"), tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("rollout/lag_max", 0) for line in lines) <= 2
    fates = [json.loads(line) for line in (run / "prompts.jsonl").read_text().splitlines()]
    used = [index for line in fates for fate in ("trained", "without_signal", "failed") for index in line[fate]]
    state = json.loads((run / "checkpoints" / "step_000008" / "driver.json").read_text())
    assert len(used) == len(set(used)) and sorted({*used, *state["pending"]}) == list(range(state["cursor"]["index"]))
    assert (run / "timeline.json").stat().st_size > 0


def test_a_killed_learner_rank_takes_the_run_back_to_its_checkpoint_and_no_further(baseline, tmp_path):
    process = start(tmp_path)
    wait_for_step(tmp_path, process, 3)
    victims = [p for p in tree(process) if "ray::LearnerWorker" in title(p)]
    victims[0].kill()
    run = finish(process, tmp_path)
    assert metrics(run) == metrics(baseline)
    assert weights(run) == weights(baseline)
    log = (run / "log.txt").read_text()
    assert "learner lost (1 of at most 10 times)" in log and "back to step" in log
    assert json.loads((run / "summary.json").read_text())["cluster"]["rollbacks"] == 1


def test_a_run_that_is_asked_to_end_saves_and_goes_on_where_it_was(baseline, tmp_path):
    process = start(tmp_path, "checkpoint.every=0")
    wait_for_step(tmp_path, process, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 75, (tmp_path / "console.txt").read_text()[-3000:]
    assert "resume=auto" in (tmp_path / "console.txt").read_text()
    run = finish(start(tmp_path, "resume=auto", "checkpoint.every=0"), tmp_path)
    assert metrics(run) == metrics(baseline)
    assert weights(run) == weights(baseline)


EVERYTHING = [
    "value.enabled=true", "value.lr=1e-3", "learner.lora_rank=4", "learner.lr=1e-2", "algo.kl_coef=0.05",
    "algo.kl_reference=lagged", "algo.kl_lag=2", "eval.every=0",
]  # fmt: skip


@pytest.mark.slow  # four runs; tests/test_checkpoint_ranks.py does the same to the ranks alone
def test_a_killed_run_with_values_adapters_and_a_lagged_reference_resumes_bit_identically(tmp_path):
    whole = finish(start(tmp_path / "whole", *EVERYTHING), tmp_path / "whole")
    process = start(tmp_path / "cut", *EVERYTHING)
    wait_for_step(tmp_path / "cut", process, 3)
    kill_everything(process)
    run = finish(start(tmp_path / "cut", "resume=auto", *EVERYTHING), tmp_path / "cut")
    assert metrics(run) == metrics(whole)
    assert weights(run) == weights(whole)
    ours, theirs = (path / "checkpoints" / "step_000006" / "value_model" for path in (run, whole))
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    last = metrics(run)[-1]
    assert last["algo/ref_kl"] > 0 and "value/explained_variance" in last
    again = ["steps=1", "resume=never", f"value.path={ours}", f"model.path={run / 'checkpoints/step_000006/model'}"]
    assert "value/loss" in metrics(finish(start(tmp_path / "cut", *again, "value.enabled=true"), tmp_path / "cut"))[-1]


def test_step_credit_reaches_the_learner(tmp_path):
    overrides = ["model.path=tiny:full", "algo.preset=mdpo", "rollout.decoder.max_tokens=16", "steps=2", "checkpoint.every=0"]
    last = metrics(finish(start(tmp_path, *overrides), tmp_path))[-1]
    assert last["algo/rows"] <= 6 * 4 * 8 and last["reward/verifier_calls_saved"] > 0
    assert last["algo/ref_kl"] >= 0 and last["parity/max_abs_delta"] <= 1e-4


def test_two_ranks_and_three_workers_give_the_same_samples(baseline, tmp_path):
    """The first step's experience depends neither on the number of workers nor on the learner's shape."""
    overrides = ["steps=2", "learner.workers=2", "learner.zero_stage=3", "rollout.workers=3", "verifier.workers=1"]
    run = finish(start(tmp_path, *overrides), tmp_path)
    ours, theirs = metrics(run), metrics(baseline)
    assert ours[0] == theirs[0]
    assert {k: v for k, v in ours[1].items() if k[:6] in ("reward", "rollou")} == {
        k: v for k, v in theirs[1].items() if k[:6] in ("reward", "rollou")
    }
    for key in ("algo/policy_loss", "algo/grad_norm", "algo/entropy"):
        np.testing.assert_allclose(ours[1][key], theirs[1][key], atol=1e-5, rtol=1e-4)


def test_what_latest_names_is_settled_when_a_run_starts(tmp_path, monkeypatch):
    """Another run moves the link; the configuration of this one has to go on meaning what it meant."""
    old, new = tmp_path / "home" / "old", tmp_path / "home" / "new"
    for folder in (old, new):
        (folder / "checkpoints" / "step_1" / "model").mkdir(parents=True)
        (folder / "pass_rates.jsonl").touch()
    (old / "model").symlink_to(Path("checkpoints") / "step_1" / "model")
    latest = tmp_path / "home" / "latest"
    latest.symlink_to("old")
    cfg = recipe.load(["recipe=quickstart", f"model.path={latest}/model", f"data.pass_rates={latest}"])
    cfg.data.mixture = [{"task": "gsm8k", "pass_rates": str(latest)}, {"task": "sudoku"}]
    cfg.sft.trajectories = str(latest / "own.npz")  # not there
    settled = run.without_links(cfg)
    assert settled.model.path == str(old / "checkpoints" / "step_1" / "model") and settled.data.pass_rates == str(old)
    assert settled.data.mixture == [{"task": "gsm8k", "pass_rates": str(old)}, {"task": "sudoku"}]
    assert settled.sft.trajectories == str(latest / "own.npz") and run.without_links(settled) == settled
    latest.unlink()
    latest.symlink_to("new")
    (difference, *_) = recipe.differences(settled, run.without_links(cfg))
    assert difference.startswith("model.path") or "pass_rates" in difference
    monkeypatch.chdir(tmp_path)
    cfg.data.pass_rates = "home/latest/pass_rates.jsonl"
    assert run.without_links(cfg).data.pass_rates == "home/new/pass_rates.jsonl"
    assert run.without_links(recipe.load(["recipe=quickstart"])).model.path == "tiny:block"


def test_a_converted_models_chat_template_reaches_the_prompts(tmp_path, monkeypatch):
    causal(tmp_path / "ar")
    (tmp_path / "ar" / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    sources = []
    monkeypatch.setattr(run, "train", lambda cfg, source, *_: sources.append((cfg, source)))
    run.run(
        ["recipe=quickstart", f"model.path=convert:{tmp_path / 'ar'}", "warm_start.steps=0", "data.template=chat"]
        + [f"output_dir={tmp_path / 'out'}"]
    )
    (cfg, source) = sources[0]
    assert source.prompt(0).text.startswith("<user>") and cfg.model.path.startswith("convert:")


@pytest.mark.parametrize(
    "overrides, code, message",
    [
        (["algo.prompt_per_step=3"], 2, "algo.prompts_per_step"),
        (["recipe=quikstart"], 2, "quickstart"),
        (["model.path=/nowhere/at/all"], 2, "no config.json"),
        (["data.task=jsonl", "data.train=/nowhere.jsonl", "data.test=/nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["verifier.name=sudoko"], 2, "did you mean sudoku"),
        (["rollout.decoder.preset=fast_dllm_dual", "rollout.decoder.block_size=0"], 2, "can have auto, block"),
        (["resume=/nowhere"], 1, "no complete checkpoint"),
        (["rollout.gpus=1"], 1, "needs 2 GPU"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, overrides, code, message):
    process = start(tmp_path, *overrides)
    assert process.wait(timeout=200) == code
    console = (tmp_path / "console.txt").read_text()
    assert message in console and "error:" in console
    assert "Traceback" not in console
