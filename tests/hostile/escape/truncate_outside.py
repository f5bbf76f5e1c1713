"""Empties, renames and removes the host's file."""
# ruff: noqa

import os


def attack():
    path = FACTS["folder"] + "/secret.txt"
    for harm in (
        lambda: os.truncate(path, 0),
        lambda: os.unlink(path),
        lambda: os.rename(path, path + "2"),
        lambda: os.chmod(path, 0o777),
        lambda: os.chown(path, 1, 1),
        lambda: os.utime(path, (0, 0)),
    ):
        try:
            harm()
        except OSError:
            pass
