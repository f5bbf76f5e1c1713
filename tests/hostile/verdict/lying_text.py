"""A text that equals every text."""
# ruff: noqa


class Text(str):
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    def __hash__(self):
        return hash("x")

    def __reduce__(self):
        return (eval, ("True",))


def attack():
    return Text("wrong")
