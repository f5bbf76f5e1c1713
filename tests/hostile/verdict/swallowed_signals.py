"""Ignores everything that can be ignored, and loops."""
# ruff: noqa

import signal

for number in range(1, 65):
    try:
        signal.signal(number, lambda *args: None)
    except (OSError, ValueError):
        pass


def attack():
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue
