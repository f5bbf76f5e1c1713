"""Fills pipes and socket buffers."""
# ruff: noqa

import os, socket


def attack():
    kept = []
    while True:
        kept.append((os.pipe(), socket.socketpair()))
        for handle in (kept[-1][0][1], kept[-1][1][0].fileno()):
            os.set_blocking(handle, False)
            try:
                while True:
                    os.write(handle, b"x" * 65536)
            except BlockingIOError:
                pass
