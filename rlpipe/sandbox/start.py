"""The entry of the sandbox's own processes: `python -I -S -c 'import sys; sys.path.insert(0, …); from … import main; main()'`.

argv: the number of the control socket and the plan as JSON. A stem for the levels that fork, an inmate inside bubblewrap.
"""

from __future__ import annotations

import json
import socket
import sys

from rlpipe.sandbox import inmate, stem
from rlpipe.sandbox.confinement import Plan
from rlpipe.sandbox.limits import Limits
from rlpipe.sandbox.view import View


def pack(plan: Plan) -> str:
    limits = {name: getattr(plan.limits, name) for name in Limits.__slots__}
    view = {"library": plan.view.library, "packages": plan.view.packages, "devices": plan.view.devices}
    return json.dumps({"level": plan.level, "limits": limits, "view": view})


def unpack(text: str) -> Plan:
    parts = json.loads(text)
    view = View(**{name: tuple(paths) for name, paths in parts["view"].items()})
    return Plan(parts["level"], Limits(**parts["limits"]), view)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    plan = unpack(sys.argv[2])
    if plan.level == "bubblewrap":
        stem.warm_up(False)
        inmate.live(plan, control)
    stem.run(plan, control)
