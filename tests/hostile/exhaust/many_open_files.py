"""Opens until nothing goes."""
# ruff: noqa

import os


def attack():
    kept = []
    while True:
        kept.append(os.open("/dev/null", os.O_RDONLY))
