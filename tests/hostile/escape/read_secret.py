"""Reads a file of the judge's user."""
# ruff: noqa


def attack():
    return hunt(open(FACTS["folder"] + "/secret.txt").read())
