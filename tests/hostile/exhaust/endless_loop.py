"""Computes for ever."""
# ruff: noqa


def attack():
    while True:
        pass
