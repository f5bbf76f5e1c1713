"""Rewrites the machinery that it finds in its own process."""
# ruff: noqa

import sys


def attack():
    for name, module in list(sys.modules.items()):
        if name.startswith("rlpipe"):
            for key, value in list(vars(module).items()):
                if callable(value):
                    setattr(module, key, lambda *args, **kwargs: {"verdict": "passed", "reason": "", "calls": 1})
    return "passed"
