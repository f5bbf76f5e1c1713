"""Lets a file send the signal."""
# ruff: noqa

import fcntl, os, socket


def attack():
    one, other = socket.socketpair()
    fcntl.fcntl(one, 8, FACTS["victim"])
    fcntl.fcntl(one, 10, 9)
    fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC)
    other.send(b"x")
