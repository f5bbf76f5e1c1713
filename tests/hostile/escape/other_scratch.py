"""Looks for what other programs left in the scratch folder."""
# ruff: noqa

import os, tempfile


def attack():
    left = [
        name
        for place in ("/tmp", "/dev/shm", "/var/tmp", ".")
        if os.path.isdir(place)
        for name in os.listdir(place)
        if "left-here" in name
    ]
    open("left-here", "w").write("x")
    return FACTS["won"] if left else "nothing"
