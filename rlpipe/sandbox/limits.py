"""What one confined program may use."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from rlpipe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one process; the kernel enforces all but `wall_s`, `output_kb` and `reply_mb`, which its judge does."""

    cpu_s: float = 5.0  # rounded up to whole seconds by the kernel
    wall_s: float = 0.0  # 0: twice the processor time and two seconds, room for a busy machine
    memory_mb: int = 1024  # of address space
    scratch_mb: int = 16  # of files in the scratch folder, which is memory
    scratch_files: int = 256
    open_files: int = 64
    threads: int = 64
    output_kb: int = 1024  # printed by a program; room for the wanted output comes on top
    reply_mb: int = 16  # one value that an answer returns, as it is sent

    @property
    def deadline_s(self) -> float:
        return self.wall_s or 2.0 * self.cpu_s + 2.0

    def for_record(self, time_limit_s: float | None) -> Limits:
        """With the time limit of a record, if it has one."""
        return self if time_limit_s is None else replace(self, cpu_s=float(time_limit_s), wall_s=0.0)


def limits_from(options: dict[str, Any]) -> Limits:
    """Limits with some changed. Raises ConfigError for an unknown name or a value that is not a number above 0."""
    known = {field.name: field.type for field in fields(Limits)}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"verifier.options.code.limits.{key}: there is no such limit; known are {', '.join(known)}")
        least = 0.0 if key == "wall_s" else 1e-3
        whole = known[key] == "int"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not least <= value < math.inf:
            raise ConfigError(f"verifier.options.code.limits.{key}={value!r}: a{' whole' if whole else ''} number above 0")
    return replace(Limits(), **options)
