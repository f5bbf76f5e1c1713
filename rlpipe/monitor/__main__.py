"""`python -m rlpipe.monitor timeline RUN_DIR [steps=A-B]` · `python -m rlpipe.monitor report RUN_DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from rlpipe.errors import ConfigError, RlpipeError
from rlpipe.monitor import overlap
from rlpipe.monitor.report import write_report

USAGE = """usage: python -m rlpipe.monitor timeline RUN_DIR [steps=A-B]   who was busy when, and what overlapped
       python -m rlpipe.monitor report RUN_DIR                   write report.html again"""


def main(arguments: list[str]) -> int:
    """Returns the process's exit code."""
    try:
        match arguments:
            case ["timeline", run_dir, *options]:
                overlap.main(Path(run_dir), options)
            case ["report", run_dir]:
                print(write_report(Path(run_dir)))
            case _:
                print(USAGE, file=sys.stderr)
                return 2
    except RlpipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
