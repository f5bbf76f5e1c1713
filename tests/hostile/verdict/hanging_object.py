"""A result whose every look takes for ever."""
# ruff: noqa


class Slow:
    def forever(self, *args):
        while True:
            pass

    __repr__ = __str__ = __eq__ = __hash__ = __iter__ = __next__ = __len__ = __bool__ = __getattr__ = forever


def attack():
    return Slow()
