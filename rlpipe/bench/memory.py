"""Peak memory of a piece of work, beyond what was held before it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Memory grew at most by this much between construction and `stop()`. On a GPU: what torch allocated. On a CPU: resident
    memory, by the kernel's high-water mark; where it cannot be reset (not Linux) later work shows only what it needs beyond
    what came before it."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        if CLEAR.exists():
            _return_free_memory()
            CLEAR.write_text("5", encoding="ascii")  # resets the high-water mark of this process
        self.before = _status("VmRSS") or _high_water()

    def stop(self) -> int:
        after = torch.cuda.max_memory_allocated() if self.device == "cuda" else _high_water()
        return max(0, after - self.before)


def _return_free_memory() -> None:
    """Pages that the allocator keeps would hide what the next piece of work needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if trim is not None:
        trim(0)


def _high_water() -> int:
    found = _status("VmHWM")
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int | None:
    """Bytes of an entry of /proc/self/status; None where there is no such file."""
    if not STATUS.is_file():
        return None
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
