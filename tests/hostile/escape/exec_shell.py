"""Becomes another program."""
# ruff: noqa

import os


def attack():
    for path in ("/bin/sh", "/usr/bin/env", "/bin/busybox", "/usr/bin/python3", FACTS["python"]):
        try:
            os.execv(path, [path, "-c", f"cat {FACTS['folder']}/secret.txt"])
        except OSError:
            pass
