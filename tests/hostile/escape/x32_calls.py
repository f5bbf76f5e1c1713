"""Uses the third numbering of x86."""
# ruff: noqa

import ctypes


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    return FACTS["won"] if libc.syscall(0x40000000 + 57) >= 0 or libc.syscall(0x40000000 + 39) >= 0 else "no"
