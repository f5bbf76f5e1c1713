"""Waits for someone to come in."""
# ruff: noqa

import socket


def attack():
    with socket.create_server(("127.0.0.1", 0)):
        return FACTS["won"]
