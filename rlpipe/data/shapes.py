"""What the fields of a record are called and mean, for the data sets that people have. A new shape is an entry in a table."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlpipe import user_code
from rlpipe.data import code_answers
from rlpipe.errors import ConfigError

Fields = Mapping[str, Any]


def as_it_is(value: Any, record: Fields) -> Any:
    return value


@dataclass(frozen=True, kw_only=True)
class Shape:
    """text, answer, demonstration, uid, verifier_field, block_size: names of the field, of which the first that is there
    counts; a dot goes into a field (`reward_model.ground_truth`) · marks: a record that has all of these fields, with this in
    their text, is of this shape (for `data.format=auto`) · verifier: who judges, unless the answer has "tests" or the record
    names one · read_answer(value, record): the answer as a verifier wants it · read_text(value, record): the text, or chat
    messages. Both raise ValueError with the reason if they cannot.
    """

    text: tuple[str, ...]
    answer: tuple[str, ...]
    verifier: str
    marks: Mapping[str, str]
    read_answer: Callable[[Any, Fields], Any] = as_it_is
    read_text: Callable[[Any, Fields], Any] = as_it_is
    demonstration: tuple[str, ...] = ("demonstration",)
    uid: tuple[str, ...] = ("uid",)
    verifier_field: tuple[str, ...] = ("verifier",)
    block_size: tuple[str, ...] = ("block_size",)

    def fits(self, record: Fields) -> bool:
        values = [(lookup(record, name), mark) for name, mark in self.marks.items()]
        return all(value is not None and mark in str(value) for value, mark in values)

    def renamed(self, columns: Mapping[str, Any]) -> Shape:
        """The shape with fields of its own names. columns: `data.options`. Raises ConfigError for one that there is not."""
        known = {"prompt": "text", "answer": "answer", "demonstration": "demonstration", "uid": "uid"}
        known |= {"verifier": "verifier_field", "block_size": "block_size"}
        for column, name in columns.items():
            if column not in known or not isinstance(name, str) or not name:
                near = difflib.get_close_matches(column, known, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"data.options.{column}={name!r}: records have no such option; did you mean {near}? ({', '.join(known)}: "
                    "the name of the field that holds it)"
                )
        return replace(self, **{known[column]: (name,) for column, name in columns.items()})


def lookup(record: Any, name: str, default: Any = None) -> Any:
    """The field, by a dotted name; the field of exactly that name comes first."""
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            return default
        record = record[part]
    return record


def after_hashes(value: Any, record: Fields) -> str:
    """GSM8K (arXiv 2110.14168): the number behind the last ####, without its thousands separators."""
    text, marker, answer = str(value).rpartition("####")
    if not marker or not answer.strip():
        raise ValueError("has no #### with the answer behind it")
    return answer.strip().replace(",", "")


def boxed_or_plain(value: Any, record: Fields) -> Any:
    """MATH (arXiv 2103.03874): the content of the last \\boxed{…}; an answer without one is taken as it stands."""
    if not isinstance(value, str):
        return value
    start = value.rfind("\\boxed{")
    if start < 0:
        if lookup(record, "answer") is None:
            raise ValueError("has no \\boxed{…}")
        return value
    depth = 0
    for end in range(start + len("\\boxed"), len(value)):
        depth += {"{": 1, "}": -1}.get(value[end], 0)
        if depth == 0:
            return value[start + len("\\boxed{") : end]
    raise ValueError("has a \\boxed{ that is never closed")


def countdown_text(value: Any, record: Fields) -> str:
    """`3 5 7=22`, as our own countdown puzzles are put."""
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"must be a list of whole numbers, not {value!r:.60}")
    return f"{' '.join(map(str, value))}={lookup(record, 'target')}"


def countdown_answer(value: Any, record: Fields) -> dict[str, Any]:
    if type(value) is not int:
        raise ValueError(f"must be a whole number, not {value!r:.60}")
    return {"numbers": list(lookup(record, "nums")), "target": value}


def sudoku_clues(value: Any, record: Fields) -> str:
    """16 cells with `_` for a blank, from 16 digits with 0 for one."""
    if not isinstance(value, str) or len(value) != 16 or set(value) - set("01234"):
        raise ValueError(f"must be 16 digits of 0 to 4, not {value!r:.60}")
    return value.replace("0", "_")


SHAPES: dict[str, Shape] = {
    "verl": Shape(  # github.com/verl-project/verl: chat messages, and the answer inside reward_model
        text=("prompt",), answer=("reward_model.ground_truth",), verifier="math", read_answer=code_answers.verl,
        marks={"prompt": "", "reward_model.ground_truth": ""},
    ),
    "dllm_rl_code": Shape(
        text=("question",), answer=("test_method",), verifier="code", marks={"question": "", "test_method": ""},
        read_answer=code_answers.dllm_rl, read_text=code_answers.with_starter,
    ),
    "dllm_rl": Shape(
        text=("question", "prompt"), answer=("ground_truth_answer", "answer"), verifier="math",
        marks={"question": "", "ground_truth_answer": ""},
    ),
    "humaneval": Shape(
        text=("prompt",), answer=("test",), verifier="code", uid=("task_id",), demonstration=("canonical_solution",),
        read_answer=code_answers.human_eval, marks={"prompt": "", "entry_point": "", "test": ""},
    ),
    "mbpp": Shape(  # its full part says `text`, the sanitized one and MBPP+ say `prompt`
        text=("text", "prompt"), answer=("test_list",), verifier="code", uid=("task_id",), demonstration=("code",),
        read_answer=code_answers.mbpp, read_text=code_answers.with_asserts, marks={"test_list": "", "code": ""},
    ),
    "acecode": Shape(
        text=("question",), answer=("test_cases",), verifier="code", uid=("id", "uid"), read_answer=code_answers.ace_code,
        read_text=code_answers.with_first_case, marks={"question": "", "test_cases": ""},
    ),
    "livecodebench": Shape(
        text=("question_content",), answer=("public_test_cases",), verifier="code", uid=("question_id",),
        read_answer=code_answers.live_code_bench, read_text=code_answers.with_starter,
        marks={"question_content": "", "public_test_cases": ""},
    ),
    "gsm8k": Shape(
        text=("question",), answer=("answer",), verifier="math", demonstration=("answer",), read_answer=after_hashes,
        marks={"question": "", "answer": "####"},
    ),
    "math": Shape(  # MATH, MATH-500, AIME and the many sets made like them
        text=("problem",), answer=("answer", "solution"), verifier="math", uid=("unique_id", "uid"),
        demonstration=("solution",), read_answer=boxed_or_plain, marks={"problem": ""},
    ),
    "champ": Shape(  # github.com/yujunmao1/CHAMP
        text=("_text",), answer=("_answer",), verifier="math", uid=("identifier",), marks={"_text": "", "_answer": ""},
    ),
    "countdown": Shape(  # Jiayi-Pan/Countdown-Tasks-3to4
        text=("nums",), answer=("target",), verifier="countdown", read_text=countdown_text, read_answer=countdown_answer,
        marks={"nums": "", "target": ""},
    ),
    "sudoku": Shape(  # d1's tables of 4×4 puzzles
        text=("Puzzle",), answer=("Puzzle",), verifier="sudoku", demonstration=("Solution",), read_text=sudoku_clues,
        read_answer=lambda value, record: {"clues": sudoku_clues(value, record)}, marks={"Puzzle": "", "Solution": ""},
    ),
    "pairs": Shape(  # for supervised training, as dLLM-RL writes it
        text=("prompt",), answer=("answer", "response"), verifier="exact", demonstration=("response",),
        marks={"prompt": "", "response": ""},
    ),
    "rlpipe": Shape(  # ours; the last, because nothing marks it
        text=("prompt", "question"), answer=("answer", "ground_truth_answer"), verifier="exact", marks={},
    ),
}  # fmt: skip


def shape_of(name: str) -> Shape:
    """By name, or a user's own `file.py:NAME`. Raises ConfigError with the nearest name."""
    if ":" in name:
        return user_code.load("data.format", name, lambda value: isinstance(value, Shape), "shape")
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"data.format={name} is not one of auto, {', '.join(SHAPES)}; did you mean {near}? (or file.py:NAME)")
    return SHAPES[name]


def recognise(record: Fields) -> str:
    """Name of the first shape whose marks the record has."""
    return next(name for name, shape in SHAPES.items() if shape.fits(record))
