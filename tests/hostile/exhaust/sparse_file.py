"""A file of exabytes, in one write."""
# ruff: noqa

import os


def attack():
    handle = os.open("sparse", os.O_CREAT | os.O_RDWR)
    os.ftruncate(handle, 1 << 50)
    os.pwrite(handle, b"x", 1 << 50)
    return FACTS["won"]
