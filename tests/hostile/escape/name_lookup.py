"""Lets a name server carry the news."""
# ruff: noqa

import socket


def attack():
    return FACTS["won"] if socket.getaddrinfo("localhost.example.org", 80) else "no"
