"""An object that says it is a text, equal to all."""
# ruff: noqa


class Text:
    __class__ = str

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1


def attack():
    return Text()
