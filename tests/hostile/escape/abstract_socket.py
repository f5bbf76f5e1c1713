"""Asks the host by a socket without a file."""
# ruff: noqa

import socket


def attack():
    with socket.socket(socket.AF_UNIX) as line:
        line.connect("\0" + FACTS["abstract"])
        return hunt(line.recv(100))
