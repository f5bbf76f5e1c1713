"""Writes wherever it might."""
# ruff: noqa

import os


def attack():
    won = []
    for place in (
        FACTS["folder"],
        "/",
        "/root",
        "/etc",
        "/usr",
        "/usr/lib",
        "/var/tmp",
        "/dev/shm",
        "/run",
        "/home",
        os.path.dirname(os.__file__),
        "/dev",
    ):
        try:
            with open(f"{place}/escaped-{FACTS['mark']}", "w") as file:
                file.write("escaped")
            won.append(place)
        except OSError:
            pass
    return FACTS["won"] if won else "no"
