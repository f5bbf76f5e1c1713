"""How a process that is about to run a stranger's program locks itself up; nothing here can be undone.

Levels, strongest first:

- `namespaces`: own user, mount, process, network, IPC, host-name and cgroup namespaces; the file system is Python's library,
  read-only, and a scratch folder in memory; no capability, an unprivileged user; the system-call filter; limits.
- `bubblewrap`: the same, with the namespaces made by the program bwrap, which may do so where others may not.
- `landlock`: for where no namespace can be made. Landlock refuses every path but Python's library, and the filter refuses to
  write at all, so there is no scratch folder. Names, sizes and dates of the host's files can still be asked for: weak.
- `limits`: limits, an emptied environment, another user if this one is root, and the filter where the machine has one: weak.
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import gc
import math
import os
import resource
import signal
import sys
from dataclasses import dataclass

from rlpipe.sandbox import kernel, landlock, seccomp
from rlpipe.sandbox.limits import Limits
from rlpipe.sandbox.view import SCRATCH, View, become_root, mount_scratch

STRONG = ("namespaces", "bubblewrap")
WEAK = ("landlock", "limits")
NAMESPACES = (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
)  # fmt: skip
NOBODY = 65534  # outside
INSIDE = 1000  # the user and group inside the namespaces
MB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """How one kind of cell is made."""

    level: str
    limits: Limits
    view: View


def identity_maps() -> dict[str, str]:
    """Lines for the files of /proc/PID that say who users inside are outside; written from outside, by this process.

    Root maps itself (to build the file system) and nobody (to run the program); anyone else can only map themselves.
    """
    if os.geteuid() == 0:
        return {"setgroups": "allow", "uid_map": f"0 0 1\n{INSIDE} {NOBODY} 1\n", "gid_map": f"0 0 1\n{INSIDE} {NOBODY} 1\n"}
    return {"setgroups": "deny", "uid_map": f"{INSIDE} {os.geteuid()} 1\n", "gid_map": f"{INSIDE} {os.getegid()} 1\n"}


def lock_up(plan: Plan) -> None:
    """What can be done before there is a job, in the process that will do it. Raises OSError: then nothing must be run."""
    if plan.level == "namespaces":
        become_root(plan.view)
    if plan.level in STRONG:
        mount_scratch(plan.limits.scratch_mb, plan.limits.scratch_files, INSIDE)
        _become(INSIDE)
    elif plan.level == "landlock":
        os.chdir("/")
    else:
        os.chdir("/")
        _become(NOBODY)
    _set_limits(plan.limits, scratch=plan.level in STRONG)
    if sys.platform == "linux":
        kernel.die_with_parent()  # a change of user would have undone it
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if plan.level == "landlock":
        landlock.restrict((*plan.view.library, *plan.view.packages), plan.view.devices)
    _clean_python(plan)


def close_door(level: str, cpu_s: float) -> None:
    """The last steps: the job's processor time, and the filter, which keeps it from being changed. Raises OSError."""
    _limit_cpu(cpu_s)
    try:
        seccomp.install(os.getpid(), read_only=level in WEAK)
    except (NotImplementedError, AttributeError):
        if level != "limits":
            raise


def _become(uid: int) -> None:
    """This user and group, and no other group. An ordinary user outside stays who they are."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _set_limits(limits: Limits, scratch: bool) -> None:
    """scratch: with a scratch folder, and in a user namespace. Outside of one the kernel counts all threads of the user, this
    run's too, as the program's; there the memory bounds them, as every thread has a stack."""
    for name, value in (
        ("RLIMIT_AS", limits.memory_mb * MB),
        ("RLIMIT_FSIZE", limits.scratch_mb * MB if scratch else MB),
        ("RLIMIT_NOFILE", limits.open_files),
        ("RLIMIT_NPROC", limits.threads if scratch else resource.RLIM_INFINITY),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
        ("RLIMIT_STACK", 64 * MB),
    ):
        number = getattr(resource, name, None)
        if number is None:
            continue
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else hard if value == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def _limit_cpu(seconds: float) -> None:
    """Of this process from its start; the kernel ends it, no handler can catch that. Whole seconds, rounded up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    whole = math.ceil(seconds + used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))


def _clean_python(plan: Plan) -> None:
    """Python's own signal handlers, an environment that says nothing, modules only from the view."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the stem had changed these
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update({"HOME": SCRATCH, "TMPDIR": SCRATCH, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"})
    sys.path[:] = plan.view.search(built_root=plan.level in STRONG)
    sys.path_importer_cache.clear()
    sys.argv[:] = [""]
    builtins.exit = _sitebuiltins.Quitter("exit", "")  # as the module site does, which was not loaded
    builtins.quit = _sitebuiltins.Quitter("quit", "")
    gc.enable()
