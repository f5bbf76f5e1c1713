"""Takes its own restrictions back."""
# ruff: noqa

import ctypes, os, resource


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    won = []
    for name in ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_NPROC"):
        try:
            resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY,) * 2)
            won.append(name)
        except (OSError, ValueError):
            pass
    for option in ((38, 0, 0, 0, 0), (22, 0, 0, 0, 0), (4, 1, 0, 0, 0), (1, 0, 0, 0, 0), (36, 1, 0, 0, 0)):
        if libc.prctl(*option) == 0:
            won.append(option)
    return FACTS["won"] if won else "no"
