"""Checkpoints are complete or do not count."""

import errno
from pathlib import Path

import pytest

from rlpipe import checkpoint
from rlpipe.errors import CheckpointError


def save(content: str = "x"):
    def write(folder: str) -> None:
        (Path(folder) / "learner").mkdir()
        (Path(folder) / "learner" / "state").write_text(content)

    return write


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.write(tmp_path, step, {"step": step}, save(str(step)), keep=2)
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000003", "step_000010"]
    assert checkpoint.read_state(checkpoint.complete(tmp_path)[-1]) == {"step": 10}
    assert (checkpoint.folder_of(tmp_path, 10) / "learner" / "state").read_text() == "10"


def test_a_full_disk_leaves_the_last_good_one(tmp_path):
    checkpoint.write(tmp_path, 1, {"step": 1}, save(), keep=1)

    def full(folder: str) -> None:
        save()(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step 2.*No space left.*resume=auto"):
        checkpoint.write(tmp_path, 2, {"step": 2}, full, keep=1)

    def refused(folder: str) -> None:
        raise CheckpointError("rank 0 could not write")

    with pytest.raises(CheckpointError, match="rank 0"):
        checkpoint.write(tmp_path, 2, {"step": 2}, refused, keep=1)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_an_interrupted_write_does_not_count(tmp_path):
    checkpoint.write(tmp_path, 1, {"step": 1}, save(), keep=3)
    (tmp_path / "checkpoints" / "step_000002.partial").mkdir()
    (tmp_path / "checkpoints" / "step_000002.partial" / "driver.json").write_text("{}")
    (tmp_path / "checkpoints" / "step_000003").mkdir()
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000001"]
    checkpoint.write(tmp_path, 2, {"step": 2}, save(), keep=3)
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["step_000001", "step_000002"]


def test_a_damaged_state_is_named(tmp_path):
    folder = checkpoint.write(tmp_path, 1, {"step": 1}, save(), keep=3)
    (folder / "driver.json").write_text("{")
    with pytest.raises(CheckpointError, match="driver.json cannot be read"):
        checkpoint.read_state(folder)


def test_foreign_checkpoints_are_refused_with_both_numbers(tmp_path):
    state = {"learner": {"workers": 2, "zero_stage": 1}, "fingerprint": "a"}
    fits = dict(fingerprint="a", changes=[], learner={"workers": 2, "zero_stage": 1})
    checkpoint.check_fits(tmp_path, state, **fits)
    with pytest.raises(CheckpointError, match="2 learner ranks at ZeRO 1, this run has 1 at ZeRO 3"):
        checkpoint.check_fits(tmp_path, state, **fits | {"learner": {"workers": 1, "zero_stage": 3}})
    with pytest.raises(CheckpointError, match="learner.lr: 1 → 2"):
        checkpoint.check_fits(tmp_path, state, **fits | {"fingerprint": "b", "changes": ["learner.lr: 1 → 2"]})
