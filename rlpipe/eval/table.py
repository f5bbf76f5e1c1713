"""The results as a table: for a console, and as markdown."""

from __future__ import annotations

import sys
from typing import Any, TextIO

WIDTH = 200  # of a console that is none
FRAME = 3  # characters around the text of a column


def headers(results: dict[str, Any]) -> list[str]:
    confidence = f"{100 * results['intervals']['confidence']:g} %"
    ks = _ks(results)
    votes = sorted({_votes(results, row) for row in results["decoders"]} - {1})
    majority = [f"majority@{votes[0]}" if len(votes) == 1 else "majority"] if votes else []
    versus = ["against the first"] if len(results["decoders"]) > 1 else []
    speed = ["tokens/forward", "forwards", "tokens", "EOS", "exact", "tokens/s", "s"]
    return ["decoder", *(f"pass@{k} [{confidence}]" for k in ks), *majority, *versus, *speed]


def cells(results: dict[str, Any]) -> list[list[str]]:
    """A row of texts a decoder, under `headers`. forwards and tokens are of a response."""
    ks, several = _ks(results), len(results["decoders"]) > 1
    voting = any(row["majority"] for row in results["decoders"])
    found = []
    for row in results["decoders"]:
        time = results["run"]["decoders"][row["label"]]
        line = [row["label"], *(interval(row["pass"].get(k)) for k in ks)]
        line += [interval(row["majority"])] if voting else []
        line += [difference(row["against_first"])] if several else []
        speed = row["tokens_per_forward"]
        margin = f" ± {speed['high'] - speed['value']:.2f}" if speed["high"] is not None else ""
        line += [
            f"{speed['value']:.2f}{margin}",
            f"{row['forwards_per_response']:.1f}",
            f"{row['response_length']['mean']:.1f}",
        ]
        line += [f"{100 * row['eos_share']:.0f} %", "yes" if row["exact"] else "no"]
        rate = time["tokens_per_s"]
        found.append([*line, "–" if rate is None else f"{rate:.0f}", f"{time['seconds']:.1f}"])
    return found


def interval(estimate: dict[str, float | None] | None) -> str:
    """`0.762 [0.706, 0.810]`, `–` for none."""
    if estimate is None:
        return "–"
    ends = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{ends}"


def difference(estimate: dict[str, float | None] | None) -> str:
    """`+0.041 ± 0.020`, `–` for none."""
    if estimate is None:
        return "–"
    margin = "" if estimate["high"] is None else f" ± {estimate['high'] - estimate['value']:.3f}"
    return f"{estimate['value']:+.3f}{margin}"


def caption(results: dict[str, Any]) -> str:
    identity = results["identity"]
    workers = sorted({count for time in results["run"]["decoders"].values() for count in time["workers"]})
    model = results["run"]["settings"]["model.path"]
    return (
        f"{title(results)}, verifier {_verifier(identity['verifier'])}, seed {identity['seed']}; {model}, weights "
        f"{identity['weights']['blake2b'][:12]}; times with {' or '.join(map(str, workers))} rollout worker(s)"
    )


def _verifier(identity: dict[str, Any]) -> str:
    parts = " + ".join(f"{weight:g} {name}" for name, weight in identity["parts"].items())
    return parts or identity["name"] or ", ".join(identity["of the task"])


def title(results: dict[str, Any]) -> str:
    prompts, samples = results["prompts"]["count"], results["samples"]
    counts = f"{prompts} prompt{'s' * (prompts > 1)} × {samples} sample{'s' * (samples > 1)}"
    return f"{results['identity']['task']['name']}: {counts}"


def markdown(results: dict[str, Any]) -> str:
    """A page of its own: caption, table, what the columns mean, and the plot beside it."""
    head = headers(results)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells(results)]
    table = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    notes = (
        "pass@k is the unbiased estimate; intervals take prompts as the unit of chance. `against the first` is the difference "
        "in pass@1, prompt by prompt. A forward is one denoising step of a response; the prompt's prefill is not counted. "
        "`forwards` and `tokens` are of a response, `s` and `tokens/s` of drawing all of them on all workers. `exact`: no "
        "approximate cache."
    )
    return f"# Evaluation\n\n{caption(results)}\n\n{table}\n\n{notes}\n\n![accuracy against speed](plot.svg)\n"


def show(results: dict[str, Any], stream: TextIO | None = None) -> None:
    """Print it, in colour on a terminal; where that is too narrow, as several tables under each other."""
    from rich.console import Console
    from rich.table import Table

    from rlpipe.monitor.console import printable

    stream = sys.stdout if stream is None else stream
    console = Console(file=stream, highlight=False, markup=False, emoji=False, width=None if stream.isatty() else WIDTH)
    lines = [[printable(text) for text in line] for line in (headers(results), *cells(results))]
    console.print(printable(caption(results)))
    for columns in _side_by_side([max(map(len, column)) for column in zip(*lines, strict=True)], console.width):
        table = Table()
        for index in columns:
            table.add_column(
                lines[0][index],
                justify="right" if index else "left",
                style="bold" if index == 1 else None,
                overflow="fold",
                no_wrap=index > 0,
            )
        for line in lines[1:]:
            table.add_row(*(line[index] for index in columns))
        console.print(table)


def _side_by_side(widths: list[int], room: int) -> list[list[int]]:
    """Columns of the tables that fit into `room` characters, each with the first column; widths: of the columns' texts."""
    tables: list[list[int]] = [[0]]
    used = 1 + widths[0] + FRAME
    for index, width in enumerate(widths[1:], 1):
        if used + width + FRAME > room and len(tables[-1]) > 1:
            tables.append([0])
            used = 1 + widths[0] + FRAME
        tables[-1].append(index)
        used += width + FRAME
    return tables


def _ks(results: dict[str, Any]) -> list[str]:
    return sorted({k for row in results["decoders"] for k in row["pass"]}, key=int)


def _votes(results: dict[str, Any], row: dict[str, Any]) -> int:
    return results["samples"] * max(1, len(row["hex"]))
