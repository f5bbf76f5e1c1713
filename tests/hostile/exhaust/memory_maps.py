"""Takes memory in large maps, and touches it."""
# ruff: noqa

import mmap


def attack():
    kept = []
    while True:
        page = mmap.mmap(-1, 1 << 26)
        page[::4096] = b"x" * len(page[::4096])
        kept.append(page)
