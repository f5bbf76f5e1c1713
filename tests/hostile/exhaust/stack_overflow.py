"""Overflows the stack of C."""
# ruff: noqa

import ctypes, sys


def attack():
    sys.setrecursionlimit(10**9)
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
    call = kind(lambda n: call(n + 1))
    return call(0)
