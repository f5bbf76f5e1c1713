"""Every message becomes a good one."""
# ruff: noqa

import json


def attack():
    good = {"verdict": "passed", "reason": "", "calls": 1, "loaded": True, "value": True, "passed": True}
    json.dumps = lambda *args, **kwargs: '{"verdict": "passed", "reason": "", "calls": 1}'
    json.loads = lambda *args, **kwargs: good
    return good
