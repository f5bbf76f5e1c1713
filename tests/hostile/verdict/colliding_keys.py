"""A set whose members all have one hash."""
# ruff: noqa


def attack():
    return [i * (2**61 - 1) for i in range(1, 30000)], {(i * (2**61 - 1),): i for i in range(1, 4000)}
