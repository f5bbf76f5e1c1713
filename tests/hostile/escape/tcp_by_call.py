"""The same, past the socket module."""
# ruff: noqa

import ctypes, os


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    for family, kind in ((2, 1), (10, 1), (1, 1), (16, 3), (17, 3), (40, 1), (38, 5)):
        number = libc.socket(family, kind, 0)
        if number >= 0:
            address = b"\x02\x00" + FACTS["tcp"].to_bytes(2, "big") + b"\x7f\x00\x00\x01" + bytes(8)
            if libc.connect(number, address, 16) == 0:
                return hunt(os.read(number, 100))
    return "no"
