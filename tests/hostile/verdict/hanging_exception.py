"""An exception that cannot be told."""
# ruff: noqa


class Hanging(Exception):
    def __str__(self):
        while True:
            pass


def attack():
    raise Hanging
