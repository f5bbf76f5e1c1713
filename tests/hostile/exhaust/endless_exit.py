"""Never finishes ending."""
# ruff: noqa

import atexit, time


def attack():
    atexit.register(time.sleep, 1000)
    raise SystemExit(0)
