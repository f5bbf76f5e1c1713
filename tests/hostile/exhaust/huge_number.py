"""A number with more digits than there are atoms."""
# ruff: noqa


def attack():
    return 9**9**9
