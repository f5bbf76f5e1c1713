"""A disk that is really full: a small file system of its own, in a mount namespace."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def on_small_disk(folder: Path) -> None:
    """Runs inside the namespace, with 600 kB under `folder`."""
    import torch

    from rlpipe.checkpoint import Checkpoints, manifest, read_state
    from rlpipe.config import CheckpointConfig
    from rlpipe.learner.snapshot import Writer

    class Ranks:
        role, writer = "learner", Writer(0)

        def __init__(self, numbers: int):
            self.state, self.writer.background = torch.arange(numbers, dtype=torch.float32), True

        def shape(self):
            return {"workers": 1, "zero_stage": 1}

        def sees(self, where):
            return [("rank 0", "here", True)]

        def snapshot(self, where):
            self.writer.submit_tensors({"weights": self.state}, Path(where) / "learner" / "state.pt")

        def written(self, where):
            found = self.writer.finish()
            return [manifest.Part("rank 0", "here", {str(path.relative_to(where)): r for path, r in found.items()})]

    said: list[str] = []
    made = Checkpoints(CheckpointConfig(keep=1), folder, warn=said.append)
    ranks = Ranks(75_000)  # 300 kB
    made.save(1, {"step": 1}, [ranks])
    made.save(2, {"step": 2}, [ranks])
    ranks.state += 1  # training goes on meanwhile
    ranks.state = ranks.state[:100].clone()
    made.save(3, {"step": 3}, [ranks])
    assert len(said) == 1 and "step 2 could not be written" in said[0] and "No space left" in said[0], said
    assert manifest.damage(folder / "checkpoints" / "step_000001") == ""
    made.finish()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000003"]
    assert read_state(made.newest())["step"] == 3
    print("went on")


def has_namespaces() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "-Urm", "true"], check=False).returncode == 0


@pytest.mark.skipif(not has_namespaces(), reason="no user namespaces here")
def test_no_space_left_is_a_warning_and_the_checkpoint_before_stays(tmp_path):
    mount = f"mount -t tmpfs -o size=600k none {tmp_path}"
    code = f"import sys; sys.path[:0] = ['{HERE}', '{HERE.parent}']; from pathlib import Path; import test_checkpoint_disk as t"
    inside = f'{mount} && exec {sys.executable} -c "{code}; t.on_small_disk(Path({str(tmp_path)!r}))"'
    found = subprocess.run(["unshare", "-Urm", "sh", "-c", inside], capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.strip() == "went on", found.stderr[-2000:]
