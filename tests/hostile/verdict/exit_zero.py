"""Ends as if all were well."""
# ruff: noqa

import sys


def attack():
    sys.exit(0)
