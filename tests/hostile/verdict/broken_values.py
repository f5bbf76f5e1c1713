"""Replies that are no values."""
# ruff: noqa

import os


def attack():
    for text in (
        '{"value": {"dict": [[[], 1]]}}',
        '{"value": {"eval": "1"}}',
        '{"value": {"Fraction": [1, 0]}}',
        '{"value": {"set": [[1]]}}',
        '{"value": {"range": [0, 1, 0]}}',
        '{"value": {"ref": "x"}}',
        "[[[[",
        "NaN",
        '{"value": {"int": "zz"}}',
        '{"raised": [1, 2], "text": 3}',
        '{"raised": "x"}',
        "[]",
        "null",
        "[" * 100000,
    ):
        data = text.encode()
        for number in range(3, 32):
            try:
                os.write(number, len(data).to_bytes(4, "little") + data)
            except OSError:
                pass
    return "x"
