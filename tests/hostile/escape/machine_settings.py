"""Changes the clock, the host's name and the power."""
# ruff: noqa

import ctypes, socket, time


def attack():
    libc = ctypes.CDLL(None, use_errno=True)
    done = []
    for change in (lambda: time.clock_settime(time.CLOCK_REALTIME, 0), lambda: socket.sethostname("escaped")):
        try:
            done.append(change())
        except OSError:
            pass
    if libc.syscall(169, 0xFEE1DEAD, 672274793, 0, 0) == 0 or libc.setdomainname(b"x", 1) == 0:
        done.append(1)
    return FACTS["won"] if done else "no"
