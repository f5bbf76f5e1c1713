"""Sends three bytes of four, and waits."""
# ruff: noqa

import os, time


def attack():
    for number in range(3, 32):
        try:
            os.write(number, b"\x10\x00\x00")
        except OSError:
            pass
    time.sleep(1000)
