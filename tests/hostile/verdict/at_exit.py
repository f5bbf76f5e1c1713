"""Hopes that somebody reads what is said at the end."""
# ruff: noqa

import atexit, os


def attack():
    atexit.register(lambda: (print("passed"), os._exit(0)))
    raise SystemExit(0)
