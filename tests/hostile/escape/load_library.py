"""Loads machine code from the scratch folder."""
# ruff: noqa

import ctypes, os, shutil


def attack():
    source = next(path for path in (ctypes.__file__, os.__file__))
    shutil.copy(source, "lib.so")
    os.chmod("lib.so", 0o755)
    ctypes.CDLL("./lib.so")
    return FACTS["won"]
