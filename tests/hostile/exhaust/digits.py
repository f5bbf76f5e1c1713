"""Turns a long number into a text and back."""
# ruff: noqa

import sys


def attack():
    sys.set_int_max_str_digits(0)
    return int(str(7**20_000_000))
