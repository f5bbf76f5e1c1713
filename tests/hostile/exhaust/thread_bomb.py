"""Starts threads that never end."""
# ruff: noqa

import threading, time


def attack():
    while True:
        threading.Thread(target=time.sleep, args=(1000,)).start()
