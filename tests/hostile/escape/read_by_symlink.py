"""The same by a symbolic link of its own."""
# ruff: noqa

import os


def attack():
    os.symlink(FACTS["folder"] + "/secret.txt", "link")
    return hunt(open("link").read())
