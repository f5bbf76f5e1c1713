"""Returns, and leaves threads that never end."""
# ruff: noqa

import threading, time


def attack():
    for _ in range(4):
        threading.Thread(target=lambda: [time.sleep(0.01) for _ in iter(int, 1)]).start()
    return "done"
