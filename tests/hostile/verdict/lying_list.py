"""A list of lies."""
# ruff: noqa


class List(list):
    def __eq__(self, other):
        return True

    def __iter__(self):
        return iter([List()])

    def __len__(self):
        return 1


def attack():
    return List()
