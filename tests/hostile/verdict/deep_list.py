"""A result nested a million deep."""
# ruff: noqa


def attack():
    result = []
    for _ in range(10**6):
        result = [result]
    return result
