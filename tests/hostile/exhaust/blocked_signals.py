"""Blocks all signals, and computes for ever."""
# ruff: noqa

import signal


def attack():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    while True:
        pass
