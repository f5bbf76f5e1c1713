"""Figures of every row, and everything needed to repeat them, as one JSON-able dict.

All of it but the section `run` depends on the settings alone: two runs give the same, whatever the workers and their batches.
"""

from __future__ import annotations

import difflib
import statistics
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from rlpipe.errors import ConfigError
from rlpipe.eval.contestants import Contestant
from rlpipe.eval.identity import prompts_hash
from rlpipe.eval.session import Plan, groups
from rlpipe.eval.store import Store
from rlpipe.evaluation import intervals, measures
from rlpipe.evaluation.samples import Sample
from rlpipe.monitor.machine import machine_facts, package_versions
from rlpipe.schema import flat

FORMAT = 1


def results(known: Plan, store: Store, command: list[str]) -> dict[str, Any]:
    """What results.json holds. Raises ConfigError if no verdict has the part that `right` names."""
    cfg, first, rows = known.cfg, None, []
    for row in known.rows:
        found = groups(known, store, row)
        right = _correctness(found, cfg.right) >= cfg.right_at
        solved = right.mean(1)
        first = solved if first is None else first
        rows.append(_row(known, row, found, right) | {"against_first": _difference(solved, first, known)})
    return {
        "format": FORMAT,
        "content": known.content,
        "identity": known.identity,
        "prompts": {"count": len(known.task.prompts), "blake2b": prompts_hash(known.task.prompts)},
        "samples": cfg.samples,
        "right": {"part": cfg.right or "correct, or else reward", "at_least": cfg.right_at},
        "intervals": {
            "confidence": cfg.confidence,
            "shares": "Wilson's score interval on the effective number of independent draws; prompts are the unit of chance",
            "others": "± z standard errors over prompts",
        },
        "decoders": rows,
        "packages": package_versions(),
        "run": {
            "command": command,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": machine_facts(),
            "settings": flat(cfg),
            "decoders": {row.label: times(store, row) for row in known.rows},
        },
    }


def _row(known: Plan, row: Contestant, found: list[list[Sample]], right: np.ndarray) -> dict[str, Any]:
    """One decoder's figures. `pass` holds pass@k for each k; of HEX, whose responses are not draws of one distribution, only
    their mean, and `majority` is the vote."""
    cfg, confidence = known.cfg, known.cfg.confidence
    responses = measures.flat(found)
    tokens, forwards = measures.speed(found)
    draws = right.shape[1]
    values = {k: measures.pass_at_k(right, k) for k in sorted({1, *cfg.k}) if k == 1 or not row.hex}
    voted = measures.voted(measures.texts(found), right) if draws > 1 else None
    lengths = [sample.tokens for sample in responses]
    return {
        "label": row.label,
        "settings": [asdict(member.config) for member in row.members],
        "resolved": [member.settings for member in row.members],
        "hex": list(row.hex),
        "responses": len(responses),
        "pass": {str(k): intervals.share(value, confidence, draws / k).json() for k, value in values.items()},
        "majority": None if voted is None else intervals.share(voted, confidence).json(),
        "members": [float(part.mean()) for part in np.split(right, len(row.members), 1)] if row.hex else [],
        "parts": _parts(found, confidence),
        "tokens_per_forward": intervals.ratio(tokens, forwards, confidence).json(),
        "tokens": int(tokens.sum()),
        "forwards": int(forwards.sum()),
        "forwards_per_response": float(forwards.sum() / len(responses)),
        "response_length": {"mean": float(np.mean(lengths)), "median": statistics.median(lengths), "most": max(lengths)},
        "eos_share": float(np.mean([sample.stop == "eos" for sample in responses])),
        "exact": all(sample.exact for sample in responses),
    }


def times(store: Store, row: Contestant) -> dict[str, Any]:
    """Wall clock of drawing, summed over the calls it took; tokens_per_s is of all workers together, and of the responses that
    count: those that were drawn and lost are in neither."""
    spent = [store.spent.get(member.key, {}) for member in row.members]
    seconds, tokens = (sum(part.get(name, 0) for part in spent) for name in ("seconds", "tokens"))
    return {
        "seconds": seconds,
        "judge_seconds": sum(part.get("judge_seconds", 0) for part in spent),
        "tokens_per_s": tokens / seconds if seconds else None,
        "workers": sorted(set().union(*(store.workers.get(member.key, set()) for member in row.members))),
    }


def _difference(solved: np.ndarray, first: np.ndarray, known: Plan) -> dict[str, float | None] | None:
    """Of pass@1 to the first row's, prompt by prompt; None for the first row itself."""
    return None if solved is first else intervals.average(solved - first, known.cfg.confidence).json()


def _correctness(found: list[list[Sample]], part: str) -> np.ndarray:
    try:
        return measures.values(found, part) if part else measures.correctness(found)
    except KeyError:
        names = sorted(set.intersection(*(set(sample.parts) for sample in measures.flat(found))))
        near = difflib.get_close_matches(part, names, n=1, cutoff=0.0)[0]
        raise ConfigError(f"right={part}: verdicts have {', '.join(names)}; did you mean {near}?") from None


def _parts(found: list[list[Sample]], confidence: float) -> dict[str, Any]:
    """Mean of each part that every verdict has, the reward among them, over prompts."""
    names = sorted(set.intersection(*(set(sample.parts) for sample in measures.flat(found))))
    return {name: intervals.average(measures.values(found, name).mean(1), confidence).json() for name in names}
