"""The same by a hard link."""
# ruff: noqa

import os


def attack():
    os.link(FACTS["folder"] + "/secret.txt", "link")
    return hunt(open("link").read())
