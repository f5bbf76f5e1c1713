"""The sandbox of a process: the strongest level that works here, found by trying, and its cells."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from rlpipe.errors import ConfigError, SandboxError
from rlpipe.sandbox import judge
from rlpipe.sandbox.cells import Cells
from rlpipe.sandbox.confinement import STRONG, WEAK, Plan
from rlpipe.sandbox.limits import Limits
from rlpipe.sandbox.view import view_of_python

LIMITS = Limits()
log = logging.getLogger("rlpipe")
MODES = {"auto": STRONG + WEAK, "strict": STRONG, "weak": WEAK} | {level: (level,) for level in STRONG + WEAK}
PACKAGES = ("numpy",)
LACKS = {
    "landlock": "programs can see names, sizes and dates of this machine's files, and have no scratch folder",
    "limits": "programs can read what any user of this machine can read",
}
REMEDY = (
    "A strong sandbox needs Linux 5.12 or newer, and either unprivileged user namespaces (in a container: --privileged, or "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined; on Ubuntu: sysctl "
    "kernel.apparmor_restrict_unprivileged_userns=0) or the program bwrap (apt-get install bubblewrap) where it may make them. "
    "With verifier.sandbox=auto a weaker one is used, with a warning"
)


class Sandbox:
    """Programs run and judged in single-use confined processes.

    mode: auto (the strongest level that works; a weak one with a warning) | strict (refuse a weak one) | weak | the name of a
    level. packages: what programs may import beside the standard library, if it is installed here. warm: cells made ahead.
    Raises SandboxError if no level of the mode works, with each level's reason and the remedy; ConfigError for an unknown mode.
    """

    def __init__(self, mode: str = "auto", limits: Limits = LIMITS, packages: Sequence[str] = PACKAGES, warm: int = 2):
        if mode not in MODES:
            raise ConfigError(f"verifier.sandbox={mode}: it must be one of {', '.join(MODES)}")
        self.limits = limits
        reasons = []
        for level in MODES[mode]:
            plan = Plan(level, limits, view_of_python(packages))
            try:
                self.cells = _started(plan, warm)
            except SandboxError as error:
                reasons.append(f"{level}: {error}")
                continue
            self.level = level
            if level in WEAK:
                said = "; ".join(reasons)
                log.warning("sandbox %s is weaker than it should be: %s. %s (%s)", level, LACKS[level], REMEDY, said)
            return
        raise SandboxError(f"verifier.sandbox={mode}: programs cannot be confined here: {'; '.join(reasons)}. {REMEDY}")

    @property
    def strong(self) -> bool:
        return self.level in STRONG

    def functions(
        self, sources: Sequence[str], entry_point: str, tests: dict[str, Any], time_limit_s: float | None = None
    ) -> judge.Verdict:
        """See `judge.judge_functions`."""
        return judge.judge_functions(self.cells, sources, entry_point, tests, self.limits.for_record(time_limit_s))

    def program(
        self, sources: Sequence[str], given: str, wanted: str, time_limit_s: float | None = None, tolerance: float = 0.0
    ) -> judge.Verdict:
        """See `judge.judge_program`."""
        limits = self.limits.for_record(time_limit_s)
        return judge.judge_program(self.cells, sources, given, wanted, limits, tolerance)

    def close(self) -> None:
        """Ends every confined process. Harmless when repeated."""
        self.cells.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _started(plan: Plan, warm: int) -> Cells:
    """Cells whose first one has been seen to work: a level that can be entered, not one that should be possible."""
    if sys.platform != "linux" and plan.level != "limits":
        raise SandboxError("only on Linux")
    if plan.level == "bubblewrap" and shutil.which("bwrap") is None:
        raise SandboxError("the program bwrap is not installed")
    cells = Cells(plan, warm)
    try:
        verdict = judge.judge_program(cells, ["print(input())"], "works\n", "works", plan.limits, 0.0)
    except BaseException:
        cells.close()
        raise
    if not verdict.passed:
        cells.close()
        raise SandboxError(f"a first program failed: {verdict.cause} {verdict.detail}")
    return cells
