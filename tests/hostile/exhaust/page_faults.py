"""Maps one page over and over."""
# ruff: noqa

import mmap


def attack():
    kept = []
    while True:
        kept.append(mmap.mmap(-1, 4096))
        kept[-1][0] = 1
