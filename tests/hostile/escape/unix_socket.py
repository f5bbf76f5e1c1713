"""Asks the host by a socket in its file system."""
# ruff: noqa

import socket


def attack():
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(FACTS["unix"])
        return hunt(line.recv(100))
