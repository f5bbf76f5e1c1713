"""Ten million small things."""
# ruff: noqa


def attack():
    return [0] * 10_000_000
