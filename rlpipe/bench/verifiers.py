"""`python -m rlpipe.bench verifiers [key=value …]`: how fast and how rightly the verifiers judge, on this machine.

Mathematical answers through the verifier itself (its process included), and HumanEval's programs through the sandbox.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlpipe.bench.settings import read
from rlpipe.errors import ConfigError
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.trajectory import Prompt

HEADLINE = ("canonical_passed", "empty_passed", "seconds")  # of the programs: at the top of the report, too


@dataclass
class VerifierSettings:
    only: str = "all"  # all | math | code
    pairs: int = 400  # of mathematical answers, half of them right
    seconds: float = 2.0  # of processor time for one of them
    sandbox: str = "auto"  # of programs: auto | strict | weak
    workers: int = 2  # programs judged at a time
    seed: int = 0
    out: str = ""  # a JSON file for the results


def main(arguments: Sequence[str]) -> None:
    """Run the halves that were asked for, print them, write `out`."""
    settings = read(arguments, VerifierSettings)
    if settings.only not in ("all", *HALVES):
        raise ConfigError(f"only={settings.only}: known are all, {', '.join(HALVES)}")
    report: dict[str, Any] = {"settings": dataclasses.asdict(settings)}
    for name, half in HALVES.items():
        if settings.only in ("all", name):
            report[name] = half(settings)
            show(name, report[name])
    report |= {key: report["code"][key] for key in HEADLINE if "code" in report}
    libraries = {name: version(name) for name in ("math-verify", "sympy")}
    report |= {"machine": machine_facts(), "versions": package_versions() | libraries}
    if settings.out:
        Path(settings.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf8")


def bench_math(settings: VerifierSettings) -> dict[str, Any]:
    """start_s: until the process is ready · pairs and pairs_per_s of three kinds: plain numbers, which never reach the library;
    expressions when they are first seen; and those again, whose verdicts are remembered · verdicts: right, wrong, overtime ·
    mistaken: verdicts that are not the expected ones (list of pairs) · hostile, hostile_s: answers that would never end, and
    the longest that one took."""
    from rlpipe.verifiers import math

    rng = random.Random(settings.seed)
    plain, symbolic = [_number(rng) for _ in range(settings.pairs)], _expressions(settings.pairs, rng)
    math.judged.cache_clear()
    started = time.perf_counter()
    _judge("x+y", "y+x", settings)
    found: dict[str, Any] = {"start_s": time.perf_counter() - started}
    verdicts: Counter[str] = Counter()
    mistaken = []
    for name, pairs in (("plain", plain), ("cold", symbolic), ("warm", symbolic)):
        started = time.perf_counter()
        for reference, answer, right in pairs:
            verdict = _judge(reference, answer, settings)
            verdicts[verdict] += name != "warm"
            mistaken += [(reference, answer, verdict)] if (verdict == "right") != right else []
        seconds = time.perf_counter() - started
        found |= {f"{name}_pairs": len(pairs), f"{name}_pairs_per_s": len(pairs) / seconds}
    slowest = 0.0
    for answer in HOSTILE:
        started = time.perf_counter()
        mistaken += [("5", answer, "right")] if _judge("5", answer, settings) == "right" else []
        slowest = max(slowest, time.perf_counter() - started)
    math.release()
    return found | {"verdicts": dict(verdicts), "mistaken": mistaken, "hostile": len(HOSTILE), "hostile_s": slowest}


def _judge(reference: str, answer: str, settings: VerifierSettings) -> str:
    from rlpipe.verifiers.math import verify

    prompt = Prompt(uid="bench", task="math", text="", answer={"answer": reference})
    verdict = verify(prompt, f"\\boxed{{{answer}}}", seconds=settings.seconds)
    return "overtime" if verdict["timeout"] else "right" if verdict["reward"] else "wrong"


def _number(rng: random.Random) -> tuple[str, str, bool]:
    number, right = rng.randint(1000, 999_999), rng.random() < 0.5
    other = number if right else number + rng.choice((-10, -1, 1, 1000))
    shown = rng.choice((f"{other:,}", f"{other}.0", f"\\${other}", f"{other}\\text{{ cm}}", f"{2 * other}/2"))
    return str(number), shown, right


def _expressions(count: int, rng: random.Random) -> list[tuple[str, str, bool]]:
    """Pairs that only algebra can tell apart, no two alike."""
    made = []
    for index in range(count):
        a, b, right = rng.randint(2, 99), index + 2, index % 2 == 0
        wrong = 0 if right else 1
        reference, answer = rng.choice(
            (
                (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b + wrong})"),
                (rf"\frac{{{a}}}{{{b}}}\sqrt{{3}}", rf"\frac{{{a + wrong}\sqrt{{3}}}}{{{b}}}"),
                (f"({a},{b})", rf"\left({a}, {b + wrong}\right)"),
                (f"({a},{a + b}]", f"({a}, {a + b}" + ("]" if right else ")")),
                (rf"\{{{a},{a + b}\}}", rf"\{{{a + b + wrong},{a}\}}"),
                (rf"\begin{{pmatrix}}{a}\\{b}\end{{pmatrix}}", rf"\begin{{bmatrix}}{a}\\{b + wrong}\end{{bmatrix}}"),
                (rf"{a}\pi+{b}", rf"{b}+{a + wrong}\pi"),
                (f"y={a}x+{b}", f"y={b + wrong}+{a}x"),
            )
        )
        made.append((reference, answer, right))
    return made


HOSTILE = (
    "9^{9^{9^{9}}}", "100000!!", "((10^9)!)!", r"\sum_{n=1}^{10^{9}} \sin(n)^{n}", "(x+1)^{500} (x+2)^{500}",
    "(" * 300 + "5" + ")" * 300, "7" * 5000, r"\prod_{k=1}^{100000} k",
)  # fmt: skip


def _code(settings: VerifierSettings) -> dict[str, Any]:
    from rlpipe.bench.code import bench_code

    return bench_code(settings)


HALVES: dict[str, Callable[[VerifierSettings], dict[str, Any]]] = {"math": bench_math, "code": _code}


def show(name: str, found: dict[str, Any]) -> None:
    """A table of one half's figures; lists by their number."""
    from rich.console import Console
    from rich.table import Table

    table = Table(name, "")
    table.columns[1].justify = "right"
    for key, value in found.items():
        table.add_row(key, _shown(value))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return str(len(value) if isinstance(value, (list, tuple)) else value)
