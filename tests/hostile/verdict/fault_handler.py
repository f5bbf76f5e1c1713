"""Lets a crash write into every file."""
# ruff: noqa

import ctypes, faulthandler


def attack():
    for number in range(3, 16):
        try:
            faulthandler.enable(file=number)
        except Exception:
            pass
    ctypes.string_at(0)
