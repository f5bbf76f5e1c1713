"""Forks twice to live on after its judge."""
# ruff: noqa

import os, time


def attack():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
            open(FACTS["folder"] + "/escaped", "w").close()
        os._exit(0)
