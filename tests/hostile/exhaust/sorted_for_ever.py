"""Keeps the machine busy inside C, where no handler runs."""
# ruff: noqa


def attack():
    return sum(range(10**13))
