"""Checkpoints in an object store: complete by their last object, kept, found from another node, damaged."""

import uuid
from pathlib import Path

import pytest
from test_checkpoint import Ranks, flip, names, saved

from rlpipe import checkpoint, run
from rlpipe.checkpoint import Checkpoints
from rlpipe.checkpoint.remote import Remote
from rlpipe.config import CheckpointConfig, RunConfig
from rlpipe.errors import CheckpointError


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path) -> str:
    return f"memory://{uuid.uuid4()}" if request.param == "memory" else f"file://{tmp_path / 'store'}"


def run_dir(tmp_path: Path, node: str = "node_a") -> Path:
    folder = tmp_path / node / "mine" / "run7"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("steps: 4\n")
    return folder


def test_copies_are_kept_and_found_from_another_node(tmp_path, url):
    ranks = Ranks()
    saved(run_dir(tmp_path), ranks, 1, 2, 3, keep=2, path=url)
    assert names(run_dir(tmp_path)) == ["step_000002", "step_000003"]
    store = Remote(f"{url}/mine/run7")
    assert store.complete() == [2, 3]
    elsewhere = tmp_path / "node_b" / "mine" / "run7"
    assert checkpoint.find_run(url, "mine") == "run7"
    made = Checkpoints(CheckpointConfig(path=url), elsewhere)
    assert [folder.name for folder in made.complete()] == ["step_000002", "step_000003"]
    folder = made.newest()
    assert folder == elsewhere / "checkpoints" / "step_000003"
    checkpoint.unpack(folder, elsewhere)
    assert (elsewhere / "config.yaml").read_text() == "steps: 4\n"
    assert made.restore([ranks], folder)["step"] == 3
    made.save(4, {"step": 4}, [ranks])
    made.finish()
    assert store.complete() == [3, 4]


def test_resume_auto_finds_a_run_whose_folder_is_gone(tmp_path, url):
    saved(run_dir(tmp_path), Ranks(), 1, 2, path=url)
    cfg = RunConfig(name="mine", resume="auto", output_dir=str(tmp_path / "node_b"))
    cfg.checkpoint.path = url
    found, newest = run.run_folder(cfg)
    assert found == tmp_path / "node_b" / "mine" / "run7"
    assert newest == found / "checkpoints" / "step_000002"
    assert (found / "config.yaml").is_file()
    cfg.run_id = "run8"
    assert run.run_folder(cfg) == (tmp_path / "node_b" / "mine" / "run8", None)
    cfg.run_id, cfg.name = "", "other"
    assert run.run_folder(cfg)[1] is None


@pytest.mark.parametrize("run_id", ("run", "7", "run7-"))
def test_a_run_of_another_id_is_not_continued(tmp_path, url, run_id):
    for name in ("run7", "20", "run-x"):
        saved(run_dir(tmp_path).with_name(name), Ranks(), 1, path=url)
    cfg = RunConfig(name="mine", resume="auto", run_id=run_id, output_dir=str(tmp_path / "node_b"))
    cfg.checkpoint.path = url
    assert run.run_folder(cfg) == (tmp_path / "node_b" / "mine" / run_id, None)
    saved(run_dir(tmp_path).with_name(f"{run_id}-2"), Ranks(), 1, path=url)
    assert run.run_folder(cfg)[0].name == f"{run_id}-2"


def test_a_run_that_is_named_by_its_folder_gets_its_files_back(tmp_path, url):
    saved(run_dir(tmp_path), Ranks(), 1, path=url)
    cfg = RunConfig(name="mine", resume=str(tmp_path / "node_b" / "mine" / "run7"))
    cfg.checkpoint.path = url
    found, newest = run.run_folder(cfg)
    assert newest.name == "step_000001" and (found / "config.yaml").read_text() == "steps: 4\n"


def test_a_store_that_is_away_for_a_moment_does_not_end_a_run_that_has_all_of_it_here(tmp_path, url, monkeypatch):
    ranks = Ranks()
    made = saved(run_dir(tmp_path), ranks, 1, 2, path=url)

    def away(*path, **settings):
        raise ConnectionError("the line is down")

    monkeypatch.setattr(type(made.remote.fs), "ls", away)
    assert made.restore([ranks], made.newest())["step"] == 2
    assert "the line is down" in made.said[-1] and "has to do" in made.said[-1]
    with pytest.raises(CheckpointError, match="the line is down"):  # whoever starts cannot know what is there
        Checkpoints(CheckpointConfig(path=url), run_dir(tmp_path)).newest()


def test_a_run_whose_newest_list_is_damaged_does_not_stop_the_search(tmp_path, url):
    for name in ("aa", "zz"):
        made = saved(run_dir(tmp_path).with_name(name), Ranks(), 1, 2, path=url)
    made.remote.fs.pipe_file(made.remote._path(2, "complete.json"), b"{")
    assert checkpoint.find_run(url, "mine") == "zz"
    made.remote.fs.pipe_file(made.remote._path(1, "complete.json"), b"{")
    assert checkpoint.find_run(url, "mine") == "aa"


def test_the_run_saved_last_is_the_one_that_goes_on(tmp_path, url):
    for name in ("zz", "aa"):
        saved(run_dir(tmp_path).with_name(name), Ranks(), 1, path=url)
    assert checkpoint.find_run(url, "mine") == "aa"
    assert checkpoint.find_run(url, "mine", lambda name: name == "zz") == "zz"


def test_an_upload_that_was_cut_off_does_not_count_and_its_space_is_freed(tmp_path, url, monkeypatch):
    ranks = Ranks()
    made = saved(run_dir(tmp_path), ranks, 1, path=url)
    fs = made.remote.fs
    put, left = fs.put_file, [2]

    def failing(local, remote, **settings):
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionError("the line is down")
        return put(local, remote, **settings)

    monkeypatch.setattr(fs, "put_file", failing)
    made.save(2, {"step": 2}, [ranks])
    with pytest.raises(CheckpointError, match="could not be copied .*the line is down"):
        made.finish()
    monkeypatch.undo()
    assert made.remote.complete() == [1] and len(made.remote._steps()) == 2
    assert names(run_dir(tmp_path)) == ["step_000001", "step_000002"], "what is here is complete"
    made.save(3, {"step": 3}, [ranks])
    made.finish()
    assert made.remote.complete() == made.remote._steps() == [1, 3]


def test_damage_here_is_mended_from_there_and_damage_there_passed_over(tmp_path, url):
    ranks = Ranks()
    made = saved(run_dir(tmp_path), ranks, 1, 2, path=url)
    flip(made.newest() / "learner" / "state.pt")
    assert made.newest().name == "step_000002"
    assert "fetching step_000002" in made.said[-1]
    store = made.remote
    path = store._path(2, "learner/state.pt")
    store.fs.pipe_file(path, store.fs.cat_file(path)[:-1])
    other = Checkpoints(CheckpointConfig(path=url), tmp_path / "node_b" / "mine" / "run7", warn=made.said.append)
    assert other.newest().name == "step_000001"
    assert "step_000002 is damaged" in made.said[-2] and "instead of" in made.said[-2]


def test_a_store_that_nobody_knows_is_named_with_the_remedy(tmp_path):
    for url, said in (("nope://bucket", "Protocol not known: nope.*Give a folder"), ("abfs://bucket", "pip install")):
        with pytest.raises(CheckpointError, match=f"checkpoint.path={url}.*{said}"):
            Checkpoints(CheckpointConfig(path=url), tmp_path)
