"""Aborts with as much memory as it may have."""
# ruff: noqa

import os, resource


def attack():
    kept = bytearray(1 << 28)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))
    except ValueError:
        pass
    os.abort()
