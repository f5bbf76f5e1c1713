"""Replaces what everybody uses."""
# ruff: noqa

import builtins


def attack():
    for name in (
        "len",
        "isinstance",
        "type",
        "print",
        "open",
        "all",
        "any",
        "hash",
        "getattr",
        "str",
        "AssertionError",
        "Exception",
    ):
        setattr(builtins, name, lambda *args, **kwargs: True)
    return True
