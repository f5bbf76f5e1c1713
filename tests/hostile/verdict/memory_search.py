"""Searches its own memory, byte by byte."""
# ruff: noqa

import ctypes


def attack():
    try:
        maps = open("/proc/self/maps").read().splitlines()
    except OSError:
        maps = []
        base = id(object()) & ~0xFFFFF
        return hunt(ctypes.string_at(base, 1 << 16))
    for line in maps:
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        if line.split()[1].startswith("rw"):
            found = hunt(ctypes.string_at(low, high - low))
            if found:
                return found
