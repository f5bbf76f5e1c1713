"""Prints for ever."""
# ruff: noqa


def attack():
    while True:
        print("x" * 65536)
