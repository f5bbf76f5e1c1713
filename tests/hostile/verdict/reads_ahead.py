"""Reads all input there is, to find the next questions and answers."""
# ruff: noqa

import os, sys


def attack():
    return hunt(sys.stdin.read() + os.read(0, 1 << 20).decode())
