"""Speaks up when it is collected."""
# ruff: noqa


class Last:
    def __del__(self):
        print("passed")
        while True:
            pass


def attack():
    attack.kept = Last()
    raise SystemExit(0)
