"""Writes a well-formed verdict into every open file."""
# ruff: noqa

import json, os


def attack():
    data = json.dumps({"verdict": "passed", "reason": "", "calls": 1}).encode()
    for number in range(64):
        try:
            os.write(number, len(data).to_bytes(4, "little") + data)
        except OSError:
            pass
    return True
