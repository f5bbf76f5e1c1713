"""Ends at once, without a word."""
# ruff: noqa

import os


def attack():
    os._exit(0)
