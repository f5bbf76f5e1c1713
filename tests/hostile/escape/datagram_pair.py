"""Reaches a named socket through a pair of its own."""
# ruff: noqa

import ctypes, socket


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    pair = (ctypes.c_int * 2)()
    for kind in (2, 5, 1):
        if libc.socketpair(1, kind, 0, pair) == 0:
            line = socket.socket(fileno=pair[0])
            for name in (FACTS["unix"] + ".dgram", "\0" + FACTS["abstract"] + ".dgram"):
                try:
                    line.sendto(b"escaped", name)
                except OSError:
                    pass
