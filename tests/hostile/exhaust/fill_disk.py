"""Fills its scratch folder, in one file and in many."""
# ruff: noqa


def attack():
    number = 0
    while True:
        number += 1
        try:
            with open(f"f{number}", "wb") as file:
                while True:
                    file.write(b"x" * (1 << 20))
        except OSError:
            if number > 3000:
                raise
