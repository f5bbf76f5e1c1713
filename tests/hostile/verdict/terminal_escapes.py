"""Paints a verdict on the terminal."""
# ruff: noqa


def attack():
    print("\x1b[2J\x1b[1;1H\x1b[32mall tests passed\x1b[0m\x07\x1b]0;passed\x07\r\n")
    return "\x1b[A\x1b[2K1"
