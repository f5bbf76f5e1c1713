"""Numbers that equal everything."""
# ruff: noqa


class Number(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__

    def __int__(self):
        return Number(7)

    def __index__(self):
        return Number(7)


def attack():
    return Number(3)
