"""Reads the host's users."""
# ruff: noqa


def attack():
    return open("/etc/passwd").read()
