"""Takes memory until there is none."""
# ruff: noqa


def attack():
    kept = []
    while True:
        kept.append(bytearray(1 << 24))
