"""Asks for all of the processors, first."""
# ruff: noqa

import os


def attack():
    for ask in (
        lambda: os.nice(-20),
        lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99)),
        lambda: os.setpriority(os.PRIO_PROCESS, FACTS["victim"], 19),
    ):
        try:
            ask()
            return FACTS["won"]
        except OSError:
            pass
