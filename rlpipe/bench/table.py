"""What a bench prints: its table, and a line that says what ran where."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], report: dict[str, Any], facts: Sequence[str]):
    """Print the table and, on one line, the model, `facts` and the machine of the report. Returns the console, for more."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    settings, machine = report["settings"], report["machine"]
    model = f"{settings['model']} ({report['parameters'] / 1e6:.1f}M parameters, {settings['dtype']})"
    where = machine.get("gpu", "CPU") if settings["device"] == "cuda" else f"{machine['cpu_count']} CPU cores"
    place = f"{where}, {machine['platform']}, torch {report['versions']['torch']}, {settings['threads']} threads"
    console.print(" · ".join((model, *facts, place)), soft_wrap=True)
    return console
