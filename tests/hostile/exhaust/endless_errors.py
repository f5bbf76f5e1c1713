"""Complains for ever."""
# ruff: noqa

import os


def attack():
    while True:
        os.write(2, b"x" * 65536)
