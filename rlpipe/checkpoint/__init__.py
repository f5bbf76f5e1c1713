"""Run checkpoints: a folder that either is complete or does not count.

`checkpoints/step_000020/` holds the learner's part (DeepSpeed), Hugging Face folders `model/` (and `value_model/`), the
driver's state in `driver.json`, the run's `config.yaml`, and `complete.json`, the list of all files with their digests. It is
written under a temporary name, synced and renamed, so an interrupted or failed write never shadows the last good one.
"""

from rlpipe.checkpoint.fitting import check_fits, shape
from rlpipe.checkpoint.folders import STATE, complete, folder_of, read_state
from rlpipe.checkpoint.saving import Checkpoints, find_run, unpack

__all__ = ["STATE", "Checkpoints", "check_fits", "complete", "find_run", "folder_of", "read_state", "shape", "unpack"]
