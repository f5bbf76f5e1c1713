"""Raises what a failed test raises, and its opposite."""
# ruff: noqa


def attack():
    raise type("Passed", (AssertionError, StopIteration), {})("passed")
