"""Sends a datagram out."""
# ruff: noqa

import socket


def attack():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.sendto(b"escaped", ("127.0.0.1", FACTS["udp"]))
    return FACTS["won"]
