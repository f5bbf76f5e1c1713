"""Code problems as published data sets hold them, brought to the one form that the verifier of code reads.

The answer is {"tests": …} with one of
    {"kind": "check", "entry_point": name, "check": source of check(candidate), "prefix": source before the completion}
    {"kind": "asserts", "asserts": [source, …], "setup": source that runs first, "prefix": source before the completion}
    {"kind": "stdio", "inputs": [text, …], "outputs": [text, …]}
and optionally "time_limit_s". A function that cannot make sense of its record raises ValueError with the reason.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


def human_eval(value: str, fields: Fields) -> dict[str, Any]:
    """HumanEval and HumanEval+ (arXiv 2107.03374, 2305.01210). value: its source of check(candidate)."""
    entry = _source(fields, "entry_point")
    if "def check(" not in value:
        raise ValueError("defines no check(candidate)")
    return {"tests": {"kind": "check", "entry_point": entry, "check": value, "prefix": _source(fields, "prompt")}}


def mbpp(value: list[str], fields: Fields) -> dict[str, Any]:
    """MBPP, its sanitized part and MBPP+ (arXiv 2108.07732, 2305.01210). value: its list of asserts; MBPP+ brings a script of
    tests instead, which becomes the only one."""
    setup = fields.get("test_setup_code") or "\n".join(fields.get("test_imports") or [])
    script = fields.get("test")
    asserts = [script] if isinstance(script, str) and script.strip() else _texts(value)
    return {"tests": {"kind": "asserts", "asserts": asserts, "setup": setup, "prefix": ""}}


def ace_code(value: list[str], fields: Fields) -> dict[str, Any]:
    """AceCode (arXiv 2502.01718). value: its test cases, asserts."""
    return {"tests": {"kind": "asserts", "asserts": _texts(value, "test_cases"), "setup": "", "prefix": ""}}


def dllm_rl(value: str, fields: Fields) -> dict[str, Any]:
    """Records of dLLM-RL (github.com/Gen-Verse/dLLM-RL). value: test_method, `function` or `stdio`."""
    if value == "function":
        tests: dict[str, Any] = {"kind": "asserts", "asserts": _texts(fields.get("test_list")), "setup": ""}
        tests["prefix"] = fields.get("prefix") or ""
    elif value == "stdio":
        tests = _stdio(fields.get("test_input"), fields.get("test_output"), "test_input", "test_output")
    else:
        raise ValueError(f"must be function or stdio, not {value!r}")
    limit = fields.get("test_time_limit")
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(f"beside it, test_time_limit must be a number of seconds, not {limit!r}")
        tests["time_limit_s"] = float(limit)
    return {"tests": tests}


def verl(value: Any, fields: Fields) -> dict[str, Any]:
    """verl's reward_model.ground_truth: an answer, or for code a JSON text with inputs and outputs. With fn_name they are the
    arguments of calls, as lists or as texts with a JSON value a line, and the results; results may all be wrapped in lists of
    one, as in APPS. Without it a list is the lines of a text."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return {"answer": value}
    if isinstance(value, Mapping) and {"inputs", "outputs"} <= value.keys():
        inputs, outputs = (_list(value, name) for name in ("inputs", "outputs"))
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs do not pair up")
        if value.get("fn_name"):
            return {"tests": _calls_of_verl(value["fn_name"], inputs, outputs)}
        return {"tests": _stdio([*map(_joined, inputs)], [*map(_joined, outputs)], "inputs", "outputs")}
    return dict(value) if isinstance(value, Mapping) else {"answer": value}


def live_code_bench(value: str, fields: Fields) -> dict[str, Any]:
    """LiveCodeBench (arXiv 2403.07974). value: its public test cases, JSON; the private ones are JSON too, or that pickled as a
    text, compressed and in base64. Cases that call a method are JSON arguments a line, and a JSON result."""
    cases = [*_cases(value, "public_test_cases"), *_cases(fields.get("private_test_cases") or "[]", "private_test_cases")]
    if not cases:
        raise ValueError("there is not one test case")
    kinds = {case.get("testtype") for case in cases}
    if kinds == {"stdin"}:
        return {"tests": _stdio([case["input"] for case in cases], [case["output"] for case in cases], "input", "output")}
    if kinds != {"functional"}:
        raise ValueError(f"testtype must be stdin or functional in all cases, not {', '.join(map(str, kinds))}")
    metadata = fields.get("metadata") or "{}"
    name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    if not name:
        raise ValueError("the cases call a function, and metadata has no func_name")
    pairs = [([json.loads(line) for line in c["input"].split("\n") if line.strip()], json.loads(c["output"])) for c in cases]
    holder = "Solution" if "class Solution" in (fields.get("starter_code") or "") else ""
    return {"tests": _calls(name, [(arguments, [wanted]) for arguments, wanted in pairs], holder)}


def with_asserts(value: str, fields: Fields) -> str:
    """MBPP's request and the asserts it is judged by, which are where the name of the function stands."""
    return f"{value.strip()}\nYour code has to pass these tests:\n" + "\n".join(_texts(fields.get("test_list")))


def with_first_case(value: str, fields: Fields) -> str:
    """AceCode's request; one without code in it does not name the function, so its first assert follows (as in DiffuCoder)."""
    return value if "```" in value else f"{value.strip()}\n{_texts(fields.get('test_cases'), 'test_cases')[0]}"


def with_starter(value: str, fields: Fields) -> str:
    """A problem and the code it wants to be begun with, if it has one."""
    starter = (fields.get("starter_code") or fields.get("prefix") or "").rstrip()
    return f"{value.strip()}\n\nBegin with:\n```python\n{starter}\n```" if starter else value


def _stdio(inputs: Any, outputs: Any, first: str, second: str) -> dict[str, Any]:
    read, wanted = _texts(inputs, first), _texts(outputs, second)
    if len(read) != len(wanted):
        raise ValueError(f"{len(read)} {first} and {len(wanted)} {second} do not pair up")
    return {"kind": "stdio", "inputs": read, "outputs": wanted}


def _calls_of_verl(name: str, inputs: list, outputs: list) -> dict[str, Any]:
    if not inputs:
        raise ValueError("there is not one test case")
    calls = [[json.loads(line) for line in i.split("\n") if line.strip()] if isinstance(i, str) else i for i in inputs]
    if not all(isinstance(arguments, list) for arguments in calls):
        raise ValueError("inputs of a function must be lists of arguments, or texts with a JSON value a line")
    results = [_result(output) for output in outputs]
    wrapped = all(isinstance(result, list) and len(result) == 1 for result in results)
    return _calls(name, [(c, [r, *(r if wrapped else ())]) for c, r in zip(calls, results, strict=True)])


def _result(value: Any) -> Any:
    """A value, or what its JSON says; a text that is no JSON is meant as it stands."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(fields[name], list):
        raise ValueError(f"holds {name} that are no list: {fields[name]!r:.80}")
    return fields[name]


def _joined(item: Any) -> Any:
    return "\n".join(item) if isinstance(item, list) and all(isinstance(line, str) for line in item) else item


def _calls(name: str, pairs: list[tuple[list, list]], holder: str = "") -> dict[str, Any]:
    """Calls with the results that are right, as a check: a tuple is as good as a list. holder: a class that the function is a
    method of."""
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not the name of a function")
    target = f"candidate().{name}" if holder else "candidate"
    check = (
        f"import json\n\nCASES = json.loads({json.dumps(pairs)!r})\n\n\n"
        "def plain(value):\n"
        "    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value\n\n\n"
        "def check(candidate):\n"
        "    for arguments, wanted in CASES:\n"
        f"        assert plain({target}(*arguments)) in wanted\n"
    )
    return {"kind": "check", "entry_point": holder or name, "check": check, "prefix": ""}


class _TextOnly(pickle.Unpickler):
    """A data file must not run code: nothing is looked up, so only plain values come out."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _cases(value: Any, name: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        try:
            packed = zlib.decompress(base64.b64decode(value, validate=True))
            found = json.loads(_TextOnly(io.BytesIO(packed)).load())
        except (binascii.Error, zlib.error, pickle.UnpicklingError, ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{name} is neither JSON nor packed JSON: {error}") from error
    wanted = {"input", "output", "testtype"}
    if not isinstance(found, list) or not all(isinstance(case, Mapping) and wanted <= case.keys() for case in found):
        raise ValueError(f"{name} is not a list of cases with {', '.join(sorted(wanted))}")
    return found


def _source(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"beside it, {name} must be a text, not {value!r}")
    return value


def _texts(value: Any, name: str = "test_list") -> list[str]:
    """One text or a list of texts; data sets write the list as JSON too."""
    if isinstance(value, str) and name in ("test_list", "test_cases") and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(item, str) for item in found):
        raise ValueError(f"needs {name} as a list of texts that is not empty, not {value!r:.80}")
    return found
