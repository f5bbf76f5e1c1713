"""One Ray for the whole session; offline, quiet, one thread."""

import os
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["WANDB_MODE"] = "offline"
for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):  # nothing of a test goes to the home folder
    os.environ.setdefault(name, os.path.join(tempfile.gettempdir(), "rlpipe-tests-wandb"))
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="session")
def ray_session():
    from rlpipe import cluster
    from rlpipe.config import ClusterConfig

    cluster.connect(ClusterConfig(address="local"), need_cpus=8, need_gpus=0)
    yield
    cluster.disconnect()
