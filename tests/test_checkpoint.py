"""Checkpoints are complete or do not count: kept, found, damaged, refused."""

import errno
import json
import threading
from pathlib import Path

import pytest

from rlpipe import checkpoint
from rlpipe.checkpoint import Checkpoints, manifest
from rlpipe.checkpoint.fitting import EXPORT, PLAIN, UNIVERSAL, way_to_load
from rlpipe.config import CheckpointConfig
from rlpipe.errors import CheckpointError, LearnerLost, WaitTimeout


class Ranks:
    """One rank of a model whose whole state is a text; writes are held back until `gate` is set."""

    role = "learner"

    def __init__(self, text: str = "x", role: str = "learner"):
        self.text, self.role = text, role
        self.gate, self.loaded, self.fails, self.unseen = threading.Event(), [], None, False
        self.gate.set()

    def shape(self):
        return {"workers": 1, "zero_stage": 1}

    def sees(self, folder):
        return [("rank 0 of the learner", "10.0.0.7", not self.unseen and Path(folder).is_dir())]

    def snapshot(self, folder):
        self.held = (folder, self.text)

    def written(self, folder):
        assert self.gate.wait(30)
        if self.fails is not None:
            raise self.fails
        path = Path(folder) / self.role / "state.pt"
        path.parent.mkdir()
        path.write_text(self.held[1])
        return [manifest.Part("rank 0 of the learner", "10.0.0.7", {f"{self.role}/state.pt": manifest.record(path)})]

    def convert(self, folder):
        raise CheckpointError("no converter here")

    def load(self, folder, how=PLAIN):
        self.loaded.append((Path(folder).name, how, (Path(folder) / self.role / "state.pt").read_text()))


def saved(run: Path, ranks: Ranks, *steps: int, **settings) -> Checkpoints:
    said: list[str] = []
    made = Checkpoints(CheckpointConfig(**settings), run, warn=said.append, note=said.append)
    made.said = said
    run.mkdir(exist_ok=True)
    for step in steps:
        ranks.text = f"state of {step}"
        made.save(step, {"step": step}, [ranks])
    made.finish()
    return made


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("background", [True, False])
def test_the_newest_are_kept_and_loaded(tmp_path, background):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1, 2, 3, 10, keep=2, background=background)
    assert names(tmp_path) == ["step_000003", "step_000010"]
    assert made.complete() == checkpoint.complete(tmp_path)
    folder = made.newest()
    assert checkpoint.read_state(folder) == {"step": 10, "learner": {"workers": 1, "zero_stage": 1}}
    assert made.restore([ranks], folder)["step"] == 10
    assert made.restore([ranks], made.complete()[0])["step"] == 3
    assert ranks.loaded == [("step_000010", PLAIN, "state of 10"), ("step_000003", PLAIN, "state of 3")]
    assert set(manifest.read(folder)["files"]) == {"learner/state.pt", "driver.json"}


def test_training_goes_on_while_the_write_is_held_back(tmp_path):
    """What is written is the state of the snapshot; the next save waits; the step before stays until then."""
    ranks, state = Ranks(), {"step": 1, "tail": [1]}
    made = saved(tmp_path, ranks, 1, keep=1)
    ranks.gate.clear()
    ranks.text, state["step"] = "then", 2
    made.save(2, state, [ranks])
    ranks.text, state["step"] = "now", 3
    state["tail"].append(2)
    assert made.complete()[-1].name == "step_000001"
    threading.Timer(0.2, ranks.gate.set).start()
    made.save(3, state, [ranks])
    assert checkpoint.read_state(made.complete()[0])["tail"] == [1]
    assert (made.complete()[0] / "learner" / "state.pt").read_text() == "then"
    assert 0.1 < made.metrics()["perf/checkpoint_s"] < 30
    assert made.metrics() == {}
    made.finish()
    assert names(tmp_path) == ["step_000003"]


def test_a_step_that_was_just_written_is_not_written_again(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1, 2)
    before = manifest.read(made.newest())
    made.save(2, {"step": 2}, [ranks])
    made.finish()
    assert manifest.read(made.newest()) == before
    made.restore([ranks], made.newest())
    made.save(2, {"step": 2}, [ranks])
    made.finish()
    assert manifest.read(made.newest())["written"] > before["written"]


def test_a_full_disk_is_a_warning_twice_and_then_the_end(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1, keep=1)
    ranks.fails = OSError(errno.ENOSPC, "No space left on device")
    made.save(2, {"step": 2}, [ranks])
    made.save(3, {"step": 3}, [ranks])
    assert "step 2 could not be written" in made.said[-1] and "No space left" in made.said[-1]
    made.save(4, {"step": 4}, [ranks])
    with pytest.raises(CheckpointError, match=r"step 4 .*No space left.*3 in a row.*resume=auto"):
        made.save(5, {"step": 5}, [ranks])
    assert names(tmp_path) == ["step_000001"], "the last good one is left, and nothing else"


def test_failures_in_between_are_forgiven_but_not_the_last(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1, keep=1)
    for step in range(2, 12):
        ranks.fails = None if step % 3 == 0 else CheckpointError("rank 0 could not write")
        made.save(step, {"step": step}, [ranks])
    with pytest.raises(CheckpointError, match="newest checkpoint could not be written: rank 0"):
        made.finish()
    made.close()
    assert "rank 0" in made.said[-1]
    assert names(tmp_path) == ["step_000009"]


def test_a_snapshot_that_fails_counts_and_one_whose_ranks_died_does_not(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1)
    ranks.snapshot = lambda folder: (_ for _ in ()).throw(CheckpointError("no room"))
    made.save(2, {"step": 2}, [ranks])
    assert "no room" in made.said[-1] and made.failures == 1
    ranks.snapshot = lambda folder: (_ for _ in ()).throw(LearnerLost("rank 0 died"))
    with pytest.raises(LearnerLost):
        made.save(3, {"step": 3}, [ranks])
    del ranks.snapshot
    ranks.fails = LearnerLost("rank 0 died")
    made.save(3, {"step": 3}, [ranks])
    assert made.restore([ranks], made.complete()[-1])["step"] == 1
    assert "step 3 that was being written is lost" in made.said[-1] and made.failures == 1
    assert names(tmp_path) == ["step_000001"]


def test_a_failure_that_the_run_went_back_behind_counts_no_more(tmp_path):
    """Step 2 fails, step 3 is being written when a rank dies: the run goes back to it, and that is its newest checkpoint."""
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1)
    ranks.fails = CheckpointError("no room")
    made.save(2, {"step": 2}, [ranks])
    made._under_way.thread.join(10)
    ranks.fails = None
    made.save(3, {"step": 3}, [ranks])
    assert made.failures == 1
    assert made.restore([ranks], made.newest())["step"] == 3 and made.failures == 0
    made.finish()


def test_going_back_reads_a_checkpoint_once(tmp_path, monkeypatch):
    ranks, read = Ranks(), []
    made, damage = saved(tmp_path, ranks, 1, 2), manifest.damage
    monkeypatch.setattr(manifest, "damage", lambda folder: read.append(folder.name) or damage(folder))
    assert made.restore([ranks], made.newest())["step"] == 2
    assert read == ["step_000002"]
    flip(tmp_path / "checkpoints" / "step_000002" / "learner" / "state.pt")
    assert made.restore([ranks], tmp_path / "checkpoints" / "step_000002")["step"] == 1, "and is read anew the next time"


def test_a_hanging_write_ends_with_its_name(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1)
    made.timeout_s = 0.3
    ranks.gate.clear()
    made.save(2, {"step": 2}, [ranks])
    with pytest.raises(WaitTimeout, match="checkpoint of step 2"):
        made.finish()
    ranks.gate.set()


def test_an_interrupted_write_does_not_count(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1, keep=3)
    for left in ("step_000002.partial", "step_000001.replaced"):
        (tmp_path / "checkpoints" / left).mkdir()
        (tmp_path / "checkpoints" / left / "driver.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_000003").mkdir()
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000001"]
    made.save(2, {"step": 2}, [ranks])
    made.finish()
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000001", "step_000002"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_damage_is_found_and_the_one_before_is_used(tmp_path):
    ranks = Ranks()
    for harm, name, what in (
        (flip, "learner/state.pt", "other content"),
        (cut, "learner/state.pt", "bytes instead of"),
        (Path.unlink, "learner/state.pt", "cannot be read"),
        (flip, "driver.json", "other content"),
        (cut, "driver.json", "bytes instead of"),
        (cut, "complete.json", "cannot be read"),
    ):
        made = saved(tmp_path, ranks, 1, 2, 3, keep=3)
        path = tmp_path / "checkpoints" / "step_000003" / name
        harm(path)
        if path.name == "complete.json":
            cut(path)  # the brace, not only the line's end
        assert made.newest().name == "step_000002"
        assert all(part in made.said[-2] for part in ("step_000003 is damaged", name, what)), made.said
        assert made.said[-1] == "using step_000002 instead"
        assert made.restore([ranks], tmp_path / "checkpoints" / "step_000003")["step"] == 2
        assert ranks.loaded[-1][2] == "state of 2"
        made.save(3, {"step": 3}, [ranks])
        made.finish()
        assert made.newest().name == "step_000003", "made again"


def test_folders_from_before_there_were_lists_pass_for_whole(tmp_path):
    made = saved(tmp_path, Ranks(), 1, 2)
    (made.newest() / "complete.json").unlink()
    assert made.newest().name == "step_000002"
    (made.newest() / "driver.json").unlink()
    assert made.newest().name == "step_000001", "without a state it is no checkpoint"


def test_a_future_that_did_not_happen_goes(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1, 2, 9, keep=3)
    flip(tmp_path / "checkpoints" / "step_000009" / "driver.json")
    assert made.restore([ranks], made.newest())["step"] == 2
    made.save(5, {"step": 5}, [ranks])
    made.finish()
    assert names(tmp_path) == ["step_000001", "step_000002", "step_000005"]


def test_nothing_but_damage_is_an_error_and_nothing_at_all_is_none(tmp_path):
    made = saved(tmp_path, Ranks(), 1)
    flip(tmp_path / "checkpoints" / "step_000001" / "learner" / "state.pt")
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* damaged.*resume=never"):
        made.newest()
    assert Checkpoints(CheckpointConfig(), tmp_path / "other").newest() is None


def test_a_rank_that_writes_elsewhere_is_named(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1)
    ranks.unseen = True
    with pytest.raises(CheckpointError, match=r"rank 0 of the learner on node 10\.0\.0\.7 does not see .*checkpoint\.path"):
        made.save(2, {"step": 2}, [ranks])
    ranks.unseen = False
    write = ranks.written

    def elsewhere(folder):
        parts = write(folder)
        (Path(folder) / "learner" / "state.pt").unlink()
        return parts

    ranks.written = elsewhere
    made.save(2, {"step": 2}, [ranks])
    with pytest.raises(CheckpointError, match=r"10\.0\.0\.7 wrote .*state\.pt.* is not there.*checkpoint\.path"):
        made.finish()


def test_a_path_holds_the_checkpoints_and_the_run_links_to_them(tmp_path):
    run, ranks = tmp_path / "outputs" / "mine" / "run7", Ranks()
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 4\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    path = str(tmp_path / "shared")
    made = saved(run, ranks, 1, 2, path=path)
    assert made.newest() == tmp_path / "shared" / "mine" / "run7" / "step_000002"
    assert [folder.name for folder in checkpoint.complete(run)] == ["step_000001", "step_000002"]
    assert checkpoint.find_run(path, "mine") == "run7" and checkpoint.find_run(path, "other") is None
    elsewhere = tmp_path / "other_node" / "mine" / "run7"
    again = Checkpoints(CheckpointConfig(path=path), elsewhere)
    checkpoint.unpack(again.newest(), elsewhere)
    assert (elsewhere / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert (elsewhere / "config.yaml").is_file()


def test_a_run_that_began_without_a_path_goes_on_with_one(tmp_path):
    run, ranks = tmp_path / "mine" / "run", Ranks()
    run.mkdir(parents=True)
    saved(run, ranks, 1)
    made = saved(run, ranks, path=str(tmp_path / "shared"))
    assert made.restore([ranks], made.newest())["step"] == 1
    made.save(2, {"step": 2}, [ranks])
    made.finish()
    assert made.newest() == tmp_path / "shared" / "mine" / "run" / "step_000002"


def test_a_damaged_state_is_named(tmp_path):
    made = saved(tmp_path, Ranks(), 1)
    (made.newest() / "driver.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"driver\.json cannot be read"):
        checkpoint.read_state(made.complete()[0])


def test_ways_to_load():
    def way(workers, stage, now_workers, now_stage):
        saved, now = {"workers": workers, "zero_stage": stage}, {"workers": now_workers, "zero_stage": now_stage}
        return way_to_load(saved, now)

    for stage in range(4):
        assert way(2, stage, 2, stage) == PLAIN
        assert way(2, stage, 1, stage) == (UNIVERSAL if stage else PLAIN)
    assert {way(2, 1, n, 2) for n in (1, 2)} == {way(2, 2, n, 1) for n in (1, 2)} == {UNIVERSAL}
    assert {way(1, a, 1, b) for a, b in ((0, 1), (1, 0), (3, 1), (2, 3), (0, 3))} == {EXPORT}


def test_another_shape_is_said_and_a_failed_conversion_leaves_the_weights(tmp_path):
    ranks = Ranks()
    made = saved(tmp_path, ranks, 1)
    ranks.shape = lambda: {"workers": 2, "zero_stage": 1}
    made.restore([ranks], made.newest())
    assert "no converter here" in made.said[-2]
    assert "step_000001 of 1 rank at ZeRO 1, 2 ranks at ZeRO 1 read only the exported weights" in made.said[-1]
    ranks.convert = lambda folder: None
    made.restore([ranks], made.newest())
    assert made.said[-1] == "step_000001 of 1 rank at ZeRO 1 is read by 2 ranks at ZeRO 1, as a universal checkpoint"
    assert [how for _, how, _ in ranks.loaded] == [EXPORT, UNIVERSAL]


def test_foreign_checkpoints_are_refused_with_what_changed(tmp_path):
    state = {"learner": {"workers": 2, "zero_stage": 1}, "fingerprint": "a"}
    checkpoint.check_fits(tmp_path, state, fingerprint="a", changes=[])
    with pytest.raises(CheckpointError, match="learner.lr: 1 → 2"):
        checkpoint.check_fits(tmp_path, state, fingerprint="b", changes=["learner.lr: 1 → 2"])


def test_another_number_of_ranks_fits_and_another_learning_rate_does_not(tmp_path):
    from rlpipe import recipe
    from rlpipe.config import RunConfig
    from rlpipe.stage import Stage

    cfg = RunConfig(name="mine", output_dir=str(tmp_path))
    cfg.monitor.wandb, cfg.monitor.timeline = "disabled", False
    run, ranks = tmp_path / "mine" / "run", Ranks()
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(recipe.to_yaml(cfg))
    state = {"step": 1, "monitor": {"wandb_id": None}, "fingerprint": recipe.fingerprint(cfg)}
    made = saved(run, ranks)
    made.save(1, state, [ranks])
    made.finish()
    cfg.learner.workers, cfg.learner.zero_stage = 4, 3
    Stage(cfg, run, made.newest(), []).monitor.finish({}, status="finished")
    cfg.learner.lr = 0.5
    with pytest.raises(CheckpointError, match=r"(?s)belongs to another configuration:\n  learner\.lr: 1e-06 → 0\.5\n"):
        Stage(cfg, run, made.newest(), [])


def test_the_list_of_files_is_what_sha256sum_says(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.record(tmp_path / "abc") == {"size": 3, "sha256": digest}
    manifest.write(tmp_path, manifest.gather(tmp_path, []), 5)
    assert json.loads((tmp_path / "complete.json").read_text())["files"] == {"abc": {"size": 3, "sha256": digest}}
