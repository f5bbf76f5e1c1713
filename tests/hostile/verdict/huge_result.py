"""A result of a hundred megabytes."""
# ruff: noqa


def attack():
    return "x" * 100_000_000
