"""Reads at address zero."""
# ruff: noqa

import ctypes


def attack():
    return ctypes.string_at(0)
