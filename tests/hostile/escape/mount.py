"""Mounts, binds, moves and unmounts."""
# ruff: noqa

import ctypes, os


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    os.makedirs("m", exist_ok=True)
    for source, kind, flags in (
        (b"proc", b"proc", 0),
        (b"none", b"tmpfs", 0),
        (b"/", b"", 4096),
        (b"/proc", b"", 4096),
        (b"/", b"", 32),
        (b"sysfs", b"sysfs", 0),
        (b"d", b"devtmpfs", 0),
        (b"o", b"overlay", 0),
    ):
        if libc.mount(source, b"m" if flags != 32 else b"/", kind, flags, b"") == 0:
            return FACTS["won"]
    for place in (b"/tmp", b"/dev/null", b"/", b"/proc"):
        if libc.umount2(place, 2) == 0:
            return FACTS["won"]
    for number in (428, 429, 430, 431, 432, 433, 442):
        if libc.syscall(number, b"/", 0, 0, 0, 0) >= 0:
            return FACTS["won"]
