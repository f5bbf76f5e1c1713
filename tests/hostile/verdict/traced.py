"""Watches every frame for the answer, and changes what it can."""
# ruff: noqa

import sys

seen = []


def watch(frame, event, arg):
    for value in list(frame.f_locals.values()):
        if isinstance(value, str) and value.startswith("canary-"):
            seen.append(value)
    return watch


sys.settrace(watch)
sys.setprofile(watch)


def attack():
    return seen[0] if seen else "nothing seen"
