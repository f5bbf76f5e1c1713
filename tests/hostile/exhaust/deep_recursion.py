"""Calls itself a hundred million times."""
# ruff: noqa

import sys


def attack():
    sys.setrecursionlimit(10**9)

    def down(n):
        return down(n + 1) + 1

    return down(0)
