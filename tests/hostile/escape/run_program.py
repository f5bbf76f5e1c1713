"""Starts another program, in every way there is."""
# ruff: noqa

import os, subprocess


def attack():
    path = FACTS["folder"] + "/secret.txt"
    for way in (
        lambda: subprocess.run(["cat", path], capture_output=True).stdout,
        lambda: os.popen(f"cat {path}").read(),
        lambda: os.system("true") == 0 and FACTS["won"],
        lambda: os.posix_spawn("/bin/true", ["true"], {}) and FACTS["won"],
    ):
        try:
            found = hunt(way() or b"")
        except (OSError, TypeError):
            continue
        if found:
            return found
