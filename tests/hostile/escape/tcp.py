"""Fetches the secret by TCP."""
# ruff: noqa

import socket


def attack():
    with socket.create_connection(("127.0.0.1", FACTS["tcp"]), 1) as line:
        return hunt(line.recv(100))
