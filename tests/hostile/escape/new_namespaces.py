"""Becomes root of a world of its own, to attack the kernel from there."""
# ruff: noqa

import ctypes, os


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (0x10000000, 0x20000, 0x10020000, 0x40000000, 0x7E020000, 0x80):
        if libc.unshare(flags) == 0:
            return FACTS["won"]
    for flags in (0x10000000 | 17, 0x10000000 | 0x10100, 17, 0):
        if libc.syscall(56, flags, 0, 0, 0, 0) >= 0:
            return FACTS["won"]
    if libc.syscall(435, b"\0" * 88, 88) >= 0:
        return FACTS["won"]
