"""Leaves its session, and sleeps on."""
# ruff: noqa

import os, time


def attack():
    try:
        os.setsid()
    except OSError:
        pass
    time.sleep(1000)
