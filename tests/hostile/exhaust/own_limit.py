"""Has itself killed early, so that it looks like the machine's fault."""
# ruff: noqa

import os, resource, signal


def attack():
    for limit in ((0, 0), (1, 1)):
        try:
            resource.setrlimit(resource.RLIMIT_CPU, limit)
        except (OSError, ValueError):
            pass
    signal.raise_signal(signal.SIGKILL)
