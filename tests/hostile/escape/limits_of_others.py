"""Sets the limits of another process."""
# ruff: noqa

import resource


def attack():
    for pid in (FACTS["victim"], FACTS["judge"], 1):
        resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))
    return FACTS["won"]
