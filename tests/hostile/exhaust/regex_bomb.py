"""A pattern that backtracks for ages."""
# ruff: noqa

import re


def attack():
    return re.match(r"(a*)*b", "a" * 5000)
