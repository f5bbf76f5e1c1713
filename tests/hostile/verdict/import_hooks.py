"""Takes over all imports to come."""
# ruff: noqa

import sys


class Finder:
    def find_spec(self, name, path=None, target=None):
        print("asked for", name)
        return None


sys.meta_path.insert(0, Finder())
sys.path_hooks.insert(0, lambda path: Finder())


def attack():
    import antigravity_and_more  # noqa
