"""The bench of the driver: stand-ins look like what they stand for, all work is done, the report is whole. Nothing is timed."""

import json
import sys
from subprocess import run

import numpy as np
import pytest

from rlpipe import cluster
from rlpipe.bench import __main__ as entry
from rlpipe.bench import driver
from rlpipe.bench.driver import DriverSettings, growth, line, resident_mb, thread_seconds
from rlpipe.bench.stand_ins import Handle, Prompts, Work, draw_group, verdict
from rlpipe.config import AlgoConfig
from rlpipe.learner.step import plan_step
from rlpipe.objectives.objective import build_objective
from rlpipe.trajectory import replace


def test_a_drawn_group_is_what_a_sampler_could_have_recorded():
    """Whole blocks, every token once, rows as TraceRL's: one a step of a block."""
    group = draw_group(Work(samples=3, prompt_len=10, response_len=18, seconds=0.0))
    records = [replace(record, uid="p") for record in group]
    assert len(records) == 3 and all(t.is_monotone() and t.loss_mask().all() and t.exact for t in records)
    assert all(len(t.versions) == len(set((10 + np.arange(18)) // 4)) for t in records)
    advantages = np.array([1.0, -1.0, 0.5], np.float32)
    settings = {"updates": 1, "gauge_trajectories": 0, "rng": np.random.default_rng(0), "version": 1}
    plan = plan_step(records, advantages, build_objective(AlgoConfig(), 18), **settings)
    assert [sample.num_scored for sample in plan.samples] == [18] * 3 and plan.rows == 12
    assert all((sample.lag == 1).all() and np.isfinite(sample.rollout_logp).all() for sample in plan.samples)


def test_prompts_have_names_of_their_own_and_verdicts_differ():
    made = [Prompts().prompt(i) for i in range(3)]
    assert len({prompt.uid for prompt in made}) == 3
    assert [verdict(made[0], text) for text in ("1 lorem", "0 lorem")] == [1.0, 0.0]


def test_a_handle_forwards_to_its_worker():
    class Host:
        class method:
            remote = staticmethod(lambda *args, **kwargs: (args, kwargs))

    assert Handle(Host, 7).method.options(concurrency_group="control").remote(1, b=2) == ((7, 1), {"b": 2})


def test_stand_ins_import_no_torch():
    code = "import sys, rlpipe.bench.stand_ins; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0, "verifier processes would be ten times as large"


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"workers": "8,x"}, "numbers with commas"), ({"workers": "0"}, "numbers"), ({"unit": 12}, "multiple")],
)
def test_settings_that_make_no_run_are_refused(settings, said):
    with pytest.raises(driver.ConfigError, match=said):
        _ = DriverSettings(**settings).counts


def test_more_workers_get_larger_steps_and_all_runs_the_same_number_of_trajectories():
    settings = DriverSettings()
    for workers, prompts in ((8, 64), (128, 128), (512, 512)):
        cfg = settings.run_config(workers)
        assert cfg.algo.prompts_per_step == prompts and cfg.rollout.workers == workers and cfg.max_lag == 1
        assert cfg.steps * prompts * 8 == pytest.approx(settings.trajectories, rel=0.06)


def test_growth_is_that_of_the_second_half():
    assert growth([0, 50, 100, 100, 100, 100, 100], 600) == pytest.approx(0.0, abs=1e-9)
    assert growth([0, 90, 100, 102, 104, 106], 500) == pytest.approx(20.0)
    assert growth([5.0], 10) == 0.0
    assert resident_mb() > 10 and thread_seconds()["main"] > 0


def test_the_command_runs_everything_once_and_writes_a_report(tmp_path, capsys, monkeypatch, ray_session):
    monkeypatch.setattr(cluster, "disconnect", lambda: None)  # the tests share one Ray
    out = tmp_path / "bench.json"
    small = ["samples=4", "unit=8", "prompt_len=8", "response_len=16", "least_prompts=4", "verifiers=1", "ranks=2"]
    assert (
        entry.main(["driver", "workers=3", "per_process=2", "trajectories=64", "object_store_mb=100", f"out={out}", *small])
        == 0
    )
    (found,) = json.loads(out.read_text(encoding="utf8"))["runs"]
    assert found["workers"] == 3 and found["steps"] == 4 and found["trajectories"] == 64
    assert len(found["resident_mb"]) == 5 and set(found["loop_us"]) == {"take", "plan", "train", "publish", "other"}
    assert found["cpu_us"] > 0 and set(found["threads_us"]) == {*driver.THREADS, "rest"}
    printed = capsys.readouterr().out
    assert line(found) in printed
    assert entry.main(["driver", "worker=3"]) == 2 and "did you mean workers" in capsys.readouterr().err
