"""NaN, in the hope of a comparison that goes wrong."""
# ruff: noqa


def attack():
    return float("nan")
