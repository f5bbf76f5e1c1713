"""Attaches to another process."""
# ruff: noqa

import ctypes


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in (FACTS["victim"], FACTS["judge"], 1):
        if libc.ptrace(16, pid, 0, 0) == 0 or libc.ptrace(0x4206, pid, 0, 0) == 0:
            open(FACTS["folder"] + "/traced", "w").close()
            return FACTS["won"]
