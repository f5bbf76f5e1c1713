"""Closes every file, and goes on."""
# ruff: noqa

import os


def attack():
    os.closerange(0, 4096)
    return True
