"""Files of recorded trajectories: what `sft.trajectories` names."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from rlpipe.errors import DataError
from rlpipe.trajectory import COMMIT, EventLog, Trajectories, Trajectory

KINDS = (".npz", ".jsonl")


def read_recordings(path: str | Path, tokenizer, block_size: int) -> list[Trajectory]:
    """Trajectories of a file or of all files of a folder, in the order of their names.

    .npz: as `Trajectories.save` and `python -m rlpipe.sft collect` write them · .jsonl: a response a line, either by ids,
    {"prompt_ids", "response_ids", "step_map"}, or by text, {"prompt", "response", "step_map"}, which is then tokenised; the
    step map holds the denoising step of each token (any numbers, in order of time), also of an EOS behind the text if it has
    one more. `uid` is optional: without one, equal prompts are one group. block_size: of the model, which the last block of a
    line is filled up to with tokens that do not count. Raises DataError, naming file, line and field.
    """
    path = Path(path)
    files = sorted(f for f in path.iterdir() if f.suffix in KINDS) if path.is_dir() else [path]
    if not path.exists() or not files or files[0].suffix not in KINDS:
        raise DataError(f"sft.trajectories={path}: give a file that ends in {' or '.join(KINDS)}, or a folder of such files")
    found: list[Trajectory] = []
    for file in files:
        found += _archive(file) if file.suffix == ".npz" else _lines(file, tokenizer, block_size)
    if not found:
        raise DataError(f"sft.trajectories={path}: there are no trajectories in it")
    return found


def committed(
    uid: str, prompt_ids: np.ndarray, response: np.ndarray, step: np.ndarray, *, block_size: int, valid_len: int | None = None
) -> Trajectory:
    """A trajectory of commits whose probabilities nobody recorded. step int[L]: 0-based, negative: never committed."""
    position = np.flatnonzero(step >= 0)[np.argsort(step[step >= 0], kind="stable")].astype(np.int32)
    nothing = np.zeros(len(position), np.float32)
    first = len(prompt_ids) // block_size if block_size else 0
    blocks = -(-(len(prompt_ids) + len(response)) // block_size) - first if block_size else 1
    return Trajectory(
        uid=uid, sample=0, seed=0, prompt_ids=prompt_ids, response_ids=response,
        valid_len=len(response) if valid_len is None else valid_len, block_size=block_size,
        versions=np.zeros(blocks, np.int32), stop="eos", decoder={},
        events=EventLog(
            step=step[position].astype(np.int32), position=position, token=response[position].astype(np.int32),
            kind=np.full(len(position), COMMIT, np.int8), logp=nothing, logp_t1=nothing, confidence=nothing,
            forced=np.zeros(len(position), bool),
        ),
    )  # fmt: skip


def check_grid(trajectory: Trajectory, block_size: int, name: str) -> None:
    """DataError unless the trajectory was recorded on the grid that the model has."""
    if trajectory.block_size != block_size:
        grid = ("full attention", f"blocks of {trajectory.block_size}")[trajectory.block_size > 0]
        wanted = ("full attention", f"blocks of {block_size}")[block_size > 0]
        raise DataError(
            f"{name}: trajectory {trajectory.uid} was recorded with {grid}, and the model has {wanted}; record anew"
        )


def _archive(file: Path) -> list[Trajectory]:
    try:
        return list(Trajectories.load(file))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{file} holds no trajectories that can be read: {error}") from error


def _lines(file: Path, tokenizer, block_size: int) -> list[Trajectory]:
    try:
        lines = file.read_text(encoding="utf8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return [_record(line, f"{file}:{n}", tokenizer, block_size) for n, line in enumerate(lines, 1) if line.strip()]


def _record(line: str, place: str, tokenizer, block_size: int) -> Trajectory:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{place}: not usable JSON: {error}") from error
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a {type(fields).__name__} where an object with fields was expected")
    prompt = _tokens(fields, "prompt", place, tokenizer)
    response = _tokens(fields, "response", place, tokenizer)
    steps = _numbers(fields, "step_map", place)
    if "response_ids" not in fields and len(steps) == len(response) + 1:
        response = np.append(response, np.int32(tokenizer.eos_token_id))
    if len(steps) != len(response) or not len(response):
        raise DataError(
            f"{place}: field 'step_map' has {len(steps)} steps for {len(response)} tokens of the response; text that tokenises "
            "in another way than it was sampled needs prompt_ids and response_ids"
        )
    step = steps.astype(np.int64) - steps.min()
    if step.max() >= 1 << 31:
        raise DataError(f"{place}: field 'step_map' spans more than 31 bits; number the steps from 0")
    spare = -(len(prompt) + len(response)) % block_size if block_size else 0
    return committed(
        str(fields.get("uid") or prompt.tolist()),
        prompt,
        np.append(response, np.full(spare, tokenizer.eos_token_id, np.int32)).astype(np.int32),
        np.append(step, np.full(spare, -1)).astype(np.int32),
        block_size=block_size,
        valid_len=len(response),
    )


def _tokens(fields: dict[str, Any], name: str, place: str, tokenizer) -> np.ndarray:
    if f"{name}_ids" in fields:
        ids = _numbers(fields, f"{name}_ids", place)
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= len(tokenizer):
            raise DataError(f"{place}: field '{name}_ids' has ids outside the vocabulary of {len(tokenizer)}")
        return ids
    text = fields.get(name)
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: field '{name}' must be a text that is not empty, or '{name}_ids' a list of ids")
    return np.array(tokenizer(text, add_special_tokens=name == "prompt")["input_ids"], np.int32)


def _numbers(fields: dict[str, Any], name: str, place: str) -> np.ndarray:
    values = fields.get(name)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise DataError(f"{place}: field '{name}' must be a list of whole numbers")
    if any(abs(value) >= 1 << 31 for value in values):
        raise DataError(f"{place}: field '{name}' has a number of more than 31 bits")
    return np.array(values, np.int32)
