"""Whole evaluations of tiny models: the same numbers however the work is cut, interrupted or added to."""

import contextlib
import dataclasses
import io
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from tiny_models import tiny

from rlpipe import cluster
from rlpipe.errors import ConfigError, DataError, VerifierFailed
from rlpipe.eval import __main__ as command
from rlpipe.eval import plot, pools, session, table
from rlpipe.eval.settings import load
from rlpipe.eval.store import SAMPLES, Store
from rlpipe.models.loading import save_model
from rlpipe.rollout.pool import Group
from rlpipe.rollout.worker import RolloutRequest, RolloutWorker
from rlpipe.verifiers.scorer import Scorer

FIVE = "decoders=[rollout,sdar_sequential,sdar_dynamic,{preset: sdar_dynamic, threshold: 0.5, label: bold},eb_sampler]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by kind of attention."""
    home = tmp_path_factory.mktemp("models")
    for kind in ("block", "full"):
        save_model(*tiny(kind), home / kind)
    return home


class InProcess:
    """Both pools without Ray: one rollout worker that does everything in one unit, and the verifiers."""

    def __init__(self, cfg, folder, verifier):
        self.worker = RolloutWorker(0, folder, cfg.model, 1)
        self.scorer = Scorer(cfg.verifier, verifier)

    def stream(self, prompts, samples, decoder, *, what, seed):
        request = RolloutRequest(prompts=tuple(prompts), samples=samples, decoder=decoder, version=-1, seed=seed)
        for part in self.worker.generate(request):
            yield part.place, Group(prompts[part.place], list(part.trajectories), list(part.texts)), part.counters

    def score_groups(self, groups):
        return [[self.scorer.score(prompt, text) for prompt, text in group] for group in groups]


@contextlib.contextmanager
def in_process(cfg, folder, verifier, run_dir=None):
    both = InProcess(cfg, folder, verifier)
    yield both, both


@pytest.fixture
def evaluate(folders, tmp_path, monkeypatch):
    """evaluate(kind, out, key=value …) → results.json without its section `run`, and that section."""
    monkeypatch.setattr(session, "workers", in_process)

    def run(kind, out, *arguments):
        base = [f"model.path={folders / kind}", "task=sudoku", "prompts=12", "max_tokens=12", f"out={tmp_path / out}"]
        assert command.evaluate([*base, *arguments]) == 0
        results = json.loads((tmp_path / out / "results.json").read_text(encoding="utf8"))
        return results, results.pop("run")

    return run


def samples_of(tmp_path, out):
    return (tmp_path / out / SAMPLES).read_bytes()


def kept_of(tmp_path, out, decoder):
    return [line for line in map(json.loads, samples_of(tmp_path, out).splitlines()) if line["decoder"] == decoder]


def test_five_decoders_twice_and_under_other_workers(evaluate, tmp_path, capsys, monkeypatch, ray_session):
    settings = (FIVE, "samples=3", "k=[1,3]", "verifier=clue_verifier:opening")
    first, run = evaluate("block", "a", *settings, "workers=1")
    monkeypatch.setattr(session, "workers", pools.workers)
    monkeypatch.setattr(cluster, "disconnect", lambda: None)  # the tests share one Ray
    second, _ = evaluate(
        "block", "b", *settings, "workers=2", "rollout.batch_size=3", "rollout.slots=2", "verifier.batch_size=5"
    )
    assert first == second and samples_of(tmp_path, "a") == samples_of(tmp_path, "b")
    assert [row["label"] for row in first["decoders"]] == ["rollout", "sdar_sequential", "sdar_dynamic", "bold", "eb_sampler"]
    one, other = (
        np.array([line["parts"]["reward"] >= 1 for line in kept_of(tmp_path, "a", name)]) for name in ("rollout", "bold")
    )
    versus = first["decoders"][3]["against_first"]
    assert versus["value"] == pytest.approx(other.mean() - one.mean(), abs=1e-12)
    half = 1.959964 * (other.reshape(12, 3).mean(1) - one.reshape(12, 3).mean(1)).std(ddof=1) / math.sqrt(12)
    assert versus["high"] - versus["value"] == pytest.approx(half, abs=1e-6)
    shown = capsys.readouterr().out
    assert "pass@3" in shown and "majority@3" in shown and "bold" in shown
    assert run["decoders"]["bold"]["workers"] == [1] and run["decoders"]["bold"]["tokens_per_s"] > 0
    ElementTree.fromstring((tmp_path / "a" / "plot.svg").read_text(encoding="utf8"))
    page = (tmp_path / "a" / "results.md").read_text(encoding="utf8")
    assert page.count("\n| ") == 7 and "plot.svg" in page


def test_figures_are_those_of_the_kept_responses(evaluate, tmp_path):
    """Everything in the table follows from samples.jsonl alone."""
    results, _ = evaluate("block", "a", "samples=4", "k=[1,2]", "verifier=clue_verifier:share", "right_at=0.1")
    (row,) = results["decoders"]
    kept = [json.loads(line) for line in samples_of(tmp_path, "a").splitlines()]
    right = np.array([line["parts"]["reward"] >= 0.1 for line in kept]).reshape(12, 4)
    assert 0 < right.mean() < 1, "a test of nothing"
    assert row["pass"]["1"]["value"] == pytest.approx(right.mean(), abs=1e-12)
    wrong = 4 - right.sum(1)
    assert row["pass"]["2"]["value"] == pytest.approx(np.mean([1 - math.comb(w, 2) / 6 for w in wrong]), abs=1e-12)
    assert row["tokens"] == sum(line["tokens"] for line in kept) and row["forwards"] == sum(line["forwards"] for line in kept)
    assert row["tokens_per_forward"]["value"] == row["tokens"] / row["forwards"]
    assert row["eos_share"] == np.mean([line["stop"] == "eos" for line in kept]) and row["exact"] is True
    assert row["pass"]["1"]["low"] < row["pass"]["1"]["value"] < row["pass"]["1"]["high"]
    assert row["against_first"] is None and row["majority"]["value"] in np.arange(13) / 12


def test_an_evaluation_that_broke_off_ends_with_the_same_numbers(evaluate, tmp_path, monkeypatch):
    settings = ("decoders=[rollout,sdar_dynamic]", "samples=2", "rollout.batch_size=2")
    whole, _ = evaluate("block", "whole", *settings)
    add, left = Store.add, [17]

    def dies(self, key, label, groups):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        add(self, key, label, groups)

    monkeypatch.setattr(Store, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate("block", "parts", *settings)
    monkeypatch.setattr(Store, "add", add)
    drawn = samples_of(tmp_path, "parts").count(b"\n")
    with pytest.raises(ConfigError, match="resume=auto"):
        evaluate("block", "parts", *settings)
    parts, _ = evaluate("block", "parts", *settings, "resume=auto")
    assert 24 < drawn < 48 + 24 and parts == whole
    assert samples_of(tmp_path, "parts") == samples_of(tmp_path, "whole")
    monkeypatch.setattr(session, "workers", None)  # nothing is left to do
    again, _ = evaluate("block", "parts", *settings, "resume=auto")
    assert again == whole


def test_responses_without_a_verdict_are_judged_and_not_drawn_again(evaluate, tmp_path, monkeypatch):
    whole, _ = evaluate("block", "whole")
    judge = session.judge

    def fails(*_):
        raise VerifierFailed("on purpose")

    monkeypatch.setattr(session, "judge", fails)
    with pytest.raises(VerifierFailed):
        evaluate("block", "parts")
    monkeypatch.setattr(session, "judge", judge)
    monkeypatch.setattr(session, "draw", None)
    assert evaluate("block", "parts", "resume=auto")[0] == whole


def test_more_of_everything_can_be_added(evaluate, tmp_path):
    """Decoders, samples and prompts extend what is there; the numbers are those of asking for all at once."""
    evaluate("block", "grown", "samples=1", "prompts=5")
    more = ("samples=2", "k=[1,2]", "decoders=[sdar_dynamic,rollout]")
    grown, _ = evaluate("block", "grown", *more, "resume=auto")
    assert grown == evaluate("block", "whole", *more)[0]


def test_what_is_there_stays_when_it_is_drawn_again(evaluate, tmp_path, monkeypatch):
    """Another machine may draw another response: one that is judged is not replaced."""
    evaluate("block", "grown", "samples=1", "prompts=5")
    before, drawn = samples_of(tmp_path, "grown").splitlines(), session.draw

    def other(*args, **settings):
        for index, group in drawn(*args, **settings):
            yield index, [dataclasses.replace(sample, text="other") for sample in group]

    monkeypatch.setattr(session, "draw", other)
    evaluate("block", "grown", "samples=2", "prompts=5", "resume=auto")
    after = samples_of(tmp_path, "grown").splitlines()
    assert after[::2] == before and all(json.loads(line)["text"] == "other" for line in after[1::2])


def test_verdicts_are_kept_when_a_later_one_fails(evaluate, tmp_path, monkeypatch):
    whole, _ = evaluate("block", "whole")
    score, left = InProcess.score_groups, [3]

    def fails(self, groups):
        left[0] -= 1
        return score(self, groups) if left[0] else [VerifierFailed("on purpose")] * len(groups)

    monkeypatch.setattr(InProcess, "score_groups", fails)
    few = ("verifier.workers=1", "verifier.batch_size=1")
    monkeypatch.setattr(session, "JUDGED_TOGETHER", 4)
    with pytest.raises(VerifierFailed, match="on purpose"):
        evaluate("block", "parts", *few)
    assert sum(json.loads(line)["parts"] is not None for line in samples_of(tmp_path, "parts").splitlines()) == 8
    assert evaluate("block", "parts", *few, "resume=auto")[0] == whole


def test_hex_votes_over_block_lengths(evaluate, tmp_path):
    near = "{preset: fast_dllm_dual, block_size: 4, hex: [4]}"
    results, _ = evaluate("full", "a", f"decoders=[{{score: random, label: any}},{near}]", "hex=[2,4]", "samples=2", "k=[1,2]")
    one, near, vote = results["decoders"]
    assert (one["exact"], near["exact"], near["hex"]) == (True, False, [4])
    assert (one["label"], vote["label"], vote["hex"]) == ("any", "any, HEX", [2, 4])
    assert vote["responses"] == 2 * one["responses"] and len(vote["members"]) == 2 and list(vote["pass"]) == ["1"]
    assert vote["pass"]["1"]["value"] == pytest.approx(np.mean(vote["members"]))
    assert "2" in one["pass"] and vote["majority"] is not None
    x = {point.label: point.x[0] for point in plot.points(results)}
    assert x["any, HEX"] == vote["tokens_per_forward"]["value"] / 4, "four responses make one answer"


def test_settings_that_only_show_in_the_data_are_refused(folders, tmp_path):
    def plan(*arguments):
        return session.plan(load([f"model.path={folders / 'block'}", *arguments]))

    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(9)), encoding="utf8")
    records = ("task=jsonl", f"data.train={few}", "test=held_out")
    with pytest.raises(DataError, match="held-out prompts; set prompts="):
        plan(*records, "prompts=10")
    assert len(plan(*records).task.prompts) < 9, "0: all there are"
    alone = plan("task=jsonl", f"test={few}", "data.train=is/not/read.jsonl")
    assert len(alone.task.prompts) == 9, "held-out records need no training records beside them"
    with pytest.raises(ConfigError, match="did you mean sudoku"):
        plan("task=sudko")
    with pytest.raises(ConfigError, match="did you mean sudoku"):
        plan("task=sudoku", "prompts=2", "verifier=sudko")
    with pytest.raises(ConfigError, match="does not fit"):
        plan("task=sudoku", "prompts=2", "decoders=[fast_dllm_dual]")


def test_the_identity_is_of_what_shapes_the_numbers(folders):
    def content(*arguments):
        return session.plan(load([f"model.path={folders / 'block'}", "task=sudoku", "prompts=2", *arguments])).content

    same = content()
    for argument in ("workers=4", "rollout.batch_size=8", "verifier.workers=1", "out=elsewhere", "decoders=[rollout]"):
        assert content(argument) == same, argument
    for argument in ("seed=1", "prompts=3", "temperature=0.5", "template=ask {prompt}", "samples=2", "decoders=[sdar_dynamic]"):
        assert content(argument) != same, argument


def test_dry_run_says_what_would_be_done(folders, capsys):
    arguments = [f"model.path={folders / 'block'}", "task=sudoku", "prompts=3", "samples=2", FIVE, "dry_run=true"]
    assert command.evaluate([*arguments, "template=ask {prompt}"]) == 0
    shown = capsys.readouterr().out
    assert "5 decoders × 3 × 2 = 30 responses" in shown and "threshold=0.5" in shown and "ask " in shown


def test_a_dry_run_downloads_no_model(capsys, monkeypatch):
    monkeypatch.setattr(session, "plan", None)
    assert command.evaluate(["model.path=OWNER/NOT-HERE", "task=sudoku", "dry_run=true"]) == 0
    shown = capsys.readouterr().out
    assert "hf download OWNER/NOT-HERE" in shown and "template of sudoku" in shown


def test_failures_are_one_line_with_an_exit_code(folders, capsys):
    assert command.main(["model.path=/nowhere", "task=sudoku"]) == 2
    assert command.main([f"model.path={folders / 'block'}", "decoders=[sdar_dinamic]"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 and all(line.startswith("error: ") for line in shown)
    assert command.main(["help=true"]) == 0 and "decoders: list[Any]" in capsys.readouterr().out


def test_a_narrow_terminal_gets_several_tables(evaluate, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    results, run = evaluate("block", "a", "prompts=2", FIVE, "samples=2", "k=[1,2]")
    for width in (70, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        stream = Terminal()
        table.show(results | {"run": run}, stream)
        shown = stream.getvalue()
        assert "…" not in shown and all(name in shown for name in table.headers(results | {"run": run}))
        assert shown.count("sdar_sequential") == {70: 4, 80: 3, 120: 2, 200: 1}[width]


def test_a_table_of_results_without_intervals(evaluate):
    """One prompt: nothing can be said about the error, and nothing is."""
    results, run = evaluate("block", "a", "prompts=1", "decoders=[rollout,sdar_dynamic]", "samples=2")
    lines = table.cells(results | {"run": run})
    assert "±" not in "".join(lines[1])
    assert plot.svg(plot.points(results), "one").startswith("<svg")
