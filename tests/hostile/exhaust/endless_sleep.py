"""Waits for ever."""
# ruff: noqa

import time


def attack():
    while True:
        time.sleep(1000)
