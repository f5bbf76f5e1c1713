"""An object that equals everything."""
# ruff: noqa


class Everything:
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False

    def __hash__(self):
        return 0

    def __bool__(self):
        return True

    def __contains__(self, item):
        return True

    def __sub__(self, other):
        return 0

    def __len__(self):
        return 39

    def __getattr__(self, name):
        return Everything()

    def __call__(self, *args, **kwargs):
        return Everything()


def attack():
    return Everything()
