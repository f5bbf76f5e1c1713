"""Becomes root."""
# ruff: noqa

import os


def attack():
    for become in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgid(0), lambda: os.setgroups([0])):
        try:
            become()
            if os.getuid() == 0:
                open(FACTS["folder"] + "/escaped", "w").close()
                return FACTS["won"]
        except OSError:
            pass
