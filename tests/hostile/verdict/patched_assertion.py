"""Makes AssertionError harmless."""
# ruff: noqa

import builtins


class Quiet(Exception):
    pass


def attack():
    builtins.AssertionError = Quiet
    raise builtins.AssertionError
