"""What this process and its machine use of memory: read from the kernel, so cheap that every actor can be asked each step."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def usage() -> dict[str, Any]:
    """For an actor to return when it is asked.

    pid · node: host name · rss_mb, peak_rss_mb: resident memory now and at most (MiB) · cpu_s: processor seconds so far ·
    node_memory_share: of the machine or of the container's limit, 0 to 1; left out where neither can be read · gpu_mb,
    gpu_peak_mb: allocated by torch on this process's fullest GPU; left out if torch is not loaded or has no GPU in use.
    """
    resident, peak = resident_mb()
    facts: dict[str, Any] = {
        "pid": os.getpid(),
        "node": socket.gethostname(),
        "rss_mb": resident,
        "peak_rss_mb": peak,
        "cpu_s": sum(os.times()[:4]),
    }
    share = node_memory_share()
    return facts | ({} if share is None else {"node_memory_share": share}) | _gpu()


def resident_mb() -> tuple[float, float]:
    """(now, at most) of this process, MiB. The peak is never below what is seen now: the kernel updates it in batches."""
    fields = _fields(PROC / "self" / "status")
    if "VmRSS" in fields:
        now = fields["VmRSS"] / 1024
        return now, max(now, fields.get("VmHWM", 0) / 1024)
    import resource  # a kernel without /proc tells the peak only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peak, peak


def node_memory_share() -> float | None:
    """Used share of what this process may have: of the container's limit if there is one, else of the machine."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cache = _fields(CGROUP / "memory.stat").get("inactive_file", 0)  # given back before anything is killed
        if limit.isdigit() and int(limit) > 0:
            return min(1.0, max(0, int(used) - cache) / int(limit))
    except OSError:
        pass  # no container of version 2: the machine's own figures
    fields = _fields(PROC / "meminfo")
    if not fields.get("MemTotal") or "MemAvailable" not in fields:
        return None
    return 1.0 - fields["MemAvailable"] / fields["MemTotal"]


def _gpu() -> dict[str, float]:
    """torch is asked only if this process loaded it and put something on a GPU: a first call would take memory there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    devices = range(torch.cuda.device_count())
    return {
        "gpu_mb": max(torch.cuda.memory_allocated(device) for device in devices) / 2**20,
        "gpu_peak_mb": max(torch.cuda.max_memory_allocated(device) for device in devices) / 2**20,
    }


def _fields(path: Path) -> dict[str, int]:
    """Lines `Name: 123 kB` or `name 123` as numbers; empty if there is no such file."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.replace(":", " ").split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}
