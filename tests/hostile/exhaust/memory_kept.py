"""Goes on after every MemoryError."""
# ruff: noqa


def attack():
    kept = []
    while True:
        try:
            kept.append(b"x" * (1 << 20) * len(kept))
        except MemoryError:
            kept = kept[: len(kept) // 2]
