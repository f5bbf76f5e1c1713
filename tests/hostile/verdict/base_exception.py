"""Raises past every except Exception."""
# ruff: noqa


def attack():
    raise type("SystemExit", (BaseException,), {})(0)
