"""The sandbox piece by piece: the filter, the values, the messages, the verdicts, and where it cannot be strong."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from rlpipe.errors import ConfigError, SandboxError
from rlpipe.sandbox import frames, kernel, seccomp
from rlpipe.sandbox.judge import BrokenTests, agrees
from rlpipe.sandbox.limits import Limits, limits_from
from rlpipe.sandbox.sandbox import Sandbox
from rlpipe.sandbox.tester import complete, free_names
from rlpipe.sandbox.values import Unsendable, decode, encode, reflect

ROOT = Path(__file__).resolve().parent.parent


# --- the filter, in a machine of our own


def run_filter(code, number, arguments=(), arch=seccomp.AUDIT["x86_64"]):
    """What a filter returns for a call: the kernel's machine in a dozen lines."""
    data = {0: number, 4: arch} | {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}
    at, register = 0, 0
    while True:
        operation, true, false, k = code[at]
        at += 1
        if operation == seccomp.LOAD:
            register = data.get(k, 0)
        elif operation == seccomp.AND:
            register &= k
        elif operation == seccomp.JEQ:
            at += true if register == k else false
        else:
            return k


ALLOW, MISSING, REFUSED = seccomp.ALLOW, seccomp.FAIL | errno.ENOSYS, seccomp.FAIL | errno.EPERM
FORK = signal.SIGCHLD
THREAD = 0x3D0F00  # what glibc's pthread_create asks for
PID = 77


@pytest.mark.parametrize(
    "number, arguments, wanted",
    [
        (0, (), ALLOW), (1, (), ALLOW), (257, (-100, 0, os.O_CREAT | os.O_RDWR), ALLOW), (231, (), ALLOW),
        (57, (), MISSING), (58, (), MISSING), (59, (), MISSING), (322, (), MISSING), (435, (), MISSING),  # fork … clone3
        (41, (1, 1), MISSING), (42, (), MISSING), (101, (), MISSING), (310, (), MISSING), (425, (), MISSING),
        (157, (22,), MISSING), (165, (), MISSING), (272, (), MISSING), (319, (), MISSING), (86, (), MISSING),
        (56, (FORK,), REFUSED), (56, (0,), REFUSED), (56, (THREAD,), ALLOW), (56, (THREAD | 0x10000000,), REFUSED),
        (56, (THREAD | 0x20000,), REFUSED), (56, (0x100 | FORK,), REFUSED),
        (62, (PID, 15), ALLOW), (62, (PID, 9), REFUSED), (62, (-1, 15), REFUSED), (62, (0, 15), REFUSED),
        (62, (1, 15), REFUSED),
        (234, (PID, 99, 6), ALLOW), (234, (1, 1, 6), REFUSED), (234, (PID, 99, 9), REFUSED),
        (302, (0, 7), ALLOW), (302, (PID, 7), REFUSED), (302, (0, 0), REFUSED), (160, (0,), REFUSED), (160, (7,), ALLOW),
        (53, (1, 1 | 0x80000), ALLOW), (53, (1, 2), REFUSED), (53, (2, 1), REFUSED), (53, (16, 3), REFUSED),
        (72, (3, 1), ALLOW), (72, (3, 8), REFUSED), (72, (3, 1031), REFUSED),
        (16, (0, 0x5401), ALLOW), (16, (0, 0x5412), REFUSED),
        (0x40000000, (), MISSING), (0x40000000 + 57, (), MISSING),
    ],
)  # fmt: skip
def test_filter(number, arguments, wanted):
    code = seccomp.program("x86_64", PID)
    assert run_filter(code, number, arguments) == wanted


def test_filter_knows_its_machine():
    code = seccomp.program("x86_64", PID)
    assert run_filter(code, 0, arch=0x40000003) == seccomp.KILL  # the 32-bit door
    other = seccomp.program("aarch64", PID)
    assert run_filter(other, 63, arch=seccomp.AUDIT["aarch64"]) == ALLOW
    assert run_filter(other, 220, (THREAD,), seccomp.AUDIT["aarch64"]) == ALLOW
    assert run_filter(other, 220, (FORK,), seccomp.AUDIT["aarch64"]) == REFUSED
    assert run_filter(other, 221, arch=seccomp.AUDIT["aarch64"]) == MISSING  # execve
    with pytest.raises(NotImplementedError, match="riscv64"):
        seccomp.program("riscv64", PID)
    for machine in seccomp.AUDIT:
        program = seccomp.program(machine, PID, read_only=True)
        assert len(program) < 4096 and all(0 <= jump < 256 for _, *jumps, _ in program for jump in jumps)


def test_filter_without_a_scratch_folder_lets_nothing_be_written():
    code = seccomp.program("x86_64", PID, read_only=True)
    assert run_filter(code, 257, (-100, 0, os.O_RDONLY | os.O_CLOEXEC)) == ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE):
        assert run_filter(code, 257, (-100, 0, flags)) == REFUSED
        assert run_filter(code, 2, (0, flags)) == REFUSED
    assert {run_filter(code, n) for n in (82, 83, 84, 87, 88, 90, 91, 258, 263, 264, 266, 268, 280, 316, 76)} == {MISSING}


# --- values

Point = namedtuple("Point", "x y")
VALUES = [
    None, True, False, 0, -1, 2**64, -(2**200), 1.5, -0.0, float("inf"), -float("inf"), 1e308, "", "ä\ud800\x00", b"\x00\xff",
    bytearray(b"x"), 1 + 2j, complex("inf"), [], [1, [2, [3]]], (), (1, (2,)), {}, {1: 2, "a": [(1,)], (1, 2): {3}}, set(),
    {1, "a", (2, 3)}, frozenset({frozenset({1})}), deque([1, 2]), range(3, 9, 2), Decimal("1.10"), Fraction(-3, 7), ...,
    [True, 1, 1.0],
]  # fmt: skip


def there_and_back(value):
    import json

    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_values_cross_unchanged(value):
    back = there_and_back(value)
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


def test_what_crosses_is_of_exact_types():
    assert str(there_and_back(float("nan"))) == "nan"
    for value, plain in (
        (Counter("aab"), {"a": 2, "b": 1}), (OrderedDict(a=1), {"a": 1}), (Point(1, 2), (1, 2)), (type("I", (int,), {})(3), 3),
        (type("S", (str,), {"__eq__": lambda *a: True, "__hash__": str.__hash__})("x"), "x"), (signal.SIGINT, 2),
    ):  # fmt: skip
        back = there_and_back(value)
        assert back == plain and type(back) is type(plain)
    assert list(there_and_back(x * x for x in range(3))) == [0, 1, 4]
    assert there_and_back(map(str, [1])) != ["1"]  # an iterator is no list, there or here


@pytest.mark.parametrize("value", [object(), len, Unsendable, type("E", (), {"__eq__": lambda *a: True})()])
def test_what_is_no_data_is_refused_without_references(value):
    with pytest.raises(Unsendable):
        encode(value)
    assert encode([value], lambda kept: 5 if kept is value else 6) == [{"ref": 5}]


def test_endless_and_bottomless_values_are_refused():
    import itertools

    loop: list = []
    loop.append(loop)
    with pytest.raises(Unsendable):
        encode(loop)
    with pytest.raises(Unsendable):
        encode(itertools.count())
    with pytest.raises(Unsendable):
        encode(iter([1]), iterators=False)


@pytest.mark.parametrize(
    "data",
    [
        {}, {"a": 1, "b": 2}, {"eval": ["1"]}, {"dict": [[[], 1]]}, {"dict": [[1]]}, {"set": [[1]]}, {"int": "zz"}, {"int": 5},
        {"Fraction": [1, 0]}, {"Fraction": ["1"]}, {"range": [0, 1, 0]}, {"ref": 0}, {"ref": "x"}, {"complex": ["x"]},
        {"iterator": 5}, {"tuple": "abc"}, {"float": "1"}, {"float": []}, {"bytes": "x"}, {"Decimal": "x"}, {"__class__": []},
    ],
)  # fmt: skip
def test_what_is_no_value_is_refused(data):
    with pytest.raises(Unsendable):
        decode(data)
    nested = data
    for _ in range(200):
        nested = [nested]
    with pytest.raises(Unsendable):
        decode(nested)


def test_an_iterator_that_could_not_be_sent_back_is_refused():
    with pytest.raises(Unsendable, match="too many items"):
        decode({"iterator": [0] * 1_000_001})


def test_changes_in_place_keep_identities():
    inner, row, table, bag = [3], [1, 2], {"a": 1}, {1}
    args = ([row, [inner]], table, bag, bytearray(b"ab"), deque([1]))
    reflect(args, ([[2, 1, 0], [[4, 5]], 7], {"a": 2, "b": 3}, {2}, bytearray(b"c"), deque([1, 2])))
    assert args == ([[2, 1, 0], [[4, 5]], 7], {"a": 2, "b": 3}, {2}, bytearray(b"c"), deque([1, 2]))
    assert args[0][0] is row and args[0][1][0] is inner and args[1] is table and args[2] is bag
    shrunk = [1, 2, 3]
    reflect((shrunk,), ([3],))
    assert shrunk == [3]


# --- messages


def test_messages_have_a_length_that_is_believed_only_so_far():
    one, other = socket.socketpair()
    with one, other:
        frames.send(one, {"a": [1, "ä"]})
        assert frames.receive(other, 1) == {"a": [1, "ä"]}
        one.sendall((2 << 20).to_bytes(4, "little"))
        with pytest.raises(frames.Malformed):
            frames.receive(other, 1)
        for text in (b"{", b"[" * 100_000, b"1" * 5000):
            frames.send_bytes(one, text)
            with pytest.raises(frames.Malformed):
                frames.receive(other, 1)
        with pytest.raises(frames.Late):
            frames.receive(other, 1, deadline=0.0)
        one.sendall(b"\x05\x00")
        one.close()
        with pytest.raises(frames.Closed):
            frames.receive(other, 1)


# --- comparing output


@pytest.mark.parametrize(
    "printed, wanted, tolerance, same",
    [
        ("5\n", "5", 0, True), (" 5 \r\n\n", "5", 0, True), ("1 2\n3", "1 2\n3\n", 0, True), ("1  2", "1 2", 0, True),
        ("1.0", "1", 0, True), ("1e3", "1000", 0, True), ("a  b", "a b", 0, False), ("a b ", "a b", 0, True), ("", "", 0, True),
        ("5 6", "5\n6", 0, False), ("5", "6", 0, False), ("0.1000001", "0.1", 0, False), ("0.1000001", "0.1", 1e-6, True),
        ("nan", "nan", 0, True), ("nan", "1", 1e9, False), ("inf", "1", 1e9, False), ("sNaN 1", "1 1", 0, False),
        ("1e9999", "1e9998", 0, False), ("9" * 10_000, "1", 0, False), ("1_000", "1000", 0, False), ("٣", "3", 0, False),
        ("YES", "Yes", 0, False), ("x 0.30000000000000004", "x 0.3", 1e-9, True), ("1\n\n2", "1\n2", 0, False),
    ],
)  # fmt: skip
def test_output_is_compared_by_lines_then_by_numbers(printed, wanted, tolerance, same):
    assert agrees(printed, wanted, tolerance) == same


def test_limits_have_names_and_kinds():
    assert limits_from({"cpu_s": 2, "memory_mb": 100}) == Limits(cpu_s=2, memory_mb=100)
    assert Limits(cpu_s=3.0).deadline_s == 8.0 and Limits(wall_s=1.0).for_record(2.0).deadline_s == 6.0
    for wrong, said in (
        ({"cpu": 1}, "cpu_s"),
        ({"cpu_s": 0}, "above 0"),
        ({"memory_mb": 1.5}, "whole"),
        ({"cpu_s": True}, "True"),
    ):
        with pytest.raises(ConfigError, match=said):
            limits_from(wrong)


def test_names_that_tests_leave_to_the_answer():
    source = "import math\nx = f(math.pi)\nassert [g(i) for i in range(3)] == sorted(x, key=lambda k: h(k))\ndef t(a): return a"
    assert free_names(source) == ["f", "g", "h"]
    assert complete("def f(x):") == "def f(x):\n    pass\n" and complete("def f(x):\n    'doc'\n") == "def f(x):\n    'doc'\n"


# --- the real thing


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox("auto", Limits(cpu_s=2.0)) as made:
        yield made


def asserts(*lines, setup=""):
    return {"kind": "asserts", "setup": setup, "asserts": [textwrap.dedent(line) for line in lines]}


ANSWER = """
import math
class Pair:
    def __init__(self, a, b):
        self.a, self.b = a, b
    def sum(self):
        return self.a + self.b
def twice(x): return x * 2
def chain(pairs): return max(p.a for p in pairs)
def make(a): return Pair(a, a)
def adder(n): return lambda x: x + n
def order(rows): rows.sort(); rows[0].append(9)
def fill(d, s, /, *, key=1): d[key] = 2; s.add(3)
def squares(n):
    for i in range(n): yield i * i
def fails(kind): raise kind
def bad(): raise ValueError("no")
def own(): raise type("Own", (KeyError,), {})("k")
def root(): return math.isqrt(10**40)
def nothing(): pass
def apply(f, x): return f(x)
def deep(n):
    out = []
    for _ in range(n): out = [out]
    return out
"""


@pytest.mark.parametrize(
    "lines",
    [
        ["assert twice(3) == 6", "assert twice('a') == 'aa'", "assert twice([1]) == [1, 1] and type(twice((1,))) is tuple"],
        ["assert chain([Pair(5, 24), Pair(15, 25)]) == 15", "assert Pair(1, 2).sum() == 3 and make(4).a == 4"],
        ["assert adder(2)(3) == 5", "assert make(1) != make(1)", "p = make(1)\nassert p == p"],
        ["r = [[3], [1]]\nfirst = r[1]\norder(r)\nassert r == [[1, 9], [3]]"],
        ["d, s = {}, {1}\nfill(d, s, key='k')\nassert d == {'k': 2} and s == {1, 3}"],
        ["assert list(squares(4)) == [0, 1, 4, 9]", "assert squares(2) != [0, 1]", "assert next(squares(2)) == 0"],
        ["try:\n    bad()\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"],
        ["try:\n    own()\n    assert False\nexcept KeyError:\n    pass"],
        ["assert root() == 10**20", "assert nothing() is None", "assert math.isclose(twice(0.1), 0.2)"],
        ["assert apply(twice, 4) == 8 and apply(adder(1), 4) == 5"],
        ["for i in range(200):\n    assert twice(i) == 2 * i"],
        ["try:\n    absent(1)\nexcept NameError:\n    assert twice(1) == 2"],
    ],
)
def test_functions_behave_as_if_they_were_here(sandbox, lines):
    verdict = sandbox.functions([ANSWER], "", asserts(*lines))
    assert verdict.passed and verdict.share == 1.0, verdict


@pytest.mark.parametrize(
    "source, cause",
    [
        ("def f(x): return x", "wrong"), ("def g(x): return 5", "wrong"), ("def f(x): return 1 / 0", "wrong"),
        ("def f(x:", "syntax"),
        ("", "wrong"), ("raise ValueError", "ended"), ("def f(x): exit()", "ended"), ("while True: pass", "timeout"),
        ("import time\ndef f(x): time.sleep(100)", "timeout"), ("(" * 5000 + ")" * 5000, "syntax"), ("x = '\x00'", "syntax"),
        ("math = type('M', (), {'isclose': lambda *a: True})\ndef f(x): return 0", "wrong"),
    ],
)  # fmt: skip
def test_a_failure_has_its_cause(sandbox, source, cause):
    tests = asserts("assert math.isclose(f(4), 5)")
    verdict = sandbox.functions([source], "f", tests, time_limit_s=0.5)
    assert not verdict.passed and verdict.cause == cause, verdict


def test_the_share_of_tests_that_pass(sandbox):
    tests = asserts(
        "assert f(1) == 1", "assert f(2) == 0", "assert f(3) == 3", "try:\n    f(0)\nexcept BaseException:\n    pass"
    )
    source = "def f(x):\n    if not x: exit()\n    return x"
    assert sandbox.functions([source], "f", tests | {"all": True}).share == 0.5
    assert sandbox.functions([source], "f", tests).share == 0.25


def test_the_first_source_that_defines_the_function_is_run(sandbox):
    tests = {"kind": "check", "entry_point": "f", "prefix": "def g(x):\n    return x + 1\n\ndef f(x):\n    '''doc'''\n"}
    tests["check"] = "def check(candidate):\n    assert candidate(1) == g(1) == f(1)\n"
    sources = ["def f(x", "y = 1", "def f(x): return x + 1", "def f(x): return 0"]
    assert sandbox.functions(sources, "f", tests).passed
    assert not sandbox.functions(sources[::-1], "f", tests).passed


@pytest.mark.parametrize(
    "tests, said",
    [
        (asserts("assert f(1) =="), "test 0"),
        (asserts("assert f(1) == 1", setup="import no_such_module"), "no_such_module"),
        (asserts("assert 1 == 1"), "never called"),
        (asserts("assert f(object()) == 1"), "object"),
        (asserts("assert f(1) == 1", setup="import os\nos._exit(0)"), "whatever the answer"),
        ({"kind": "check", "entry_point": "f", "check": "def test(c): pass", "prefix": ""}, "check"),
        ({"kind": "check", "entry_point": "f", "check": "def check(c): pass", "prefix": "import no_such_module"}, "prefix"),
    ],
)
def test_wrong_tests_are_not_the_answer_s_fault(sandbox, tests, said):
    with pytest.raises(BrokenTests, match=said):
        sandbox.functions(["def f(x): return x"], "f", tests, time_limit_s=0.5)


def test_an_answer_cannot_make_the_tests_look_wrong(sandbox):
    verdict = sandbox.functions([ANSWER], "", asserts("assert nothing() is None", "assert twice([deep(99)]) is None"))
    assert not verdict.passed and verdict.cause == "wrong"
    starved = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (0, 0))\ndef f(x):\n    while True: pass"
    assert not sandbox.functions([starved], "f", asserts("assert f(1) == 1"), time_limit_s=0.5).passed


RAW = """
import json, os, time
def send(text):
    for number in range(3, 64):
        try: os.write(number, len(text).to_bytes(4, "little") + text.encode())
        except OSError: pass
MANY = '{"iterator": [' + "0," * 1_000_001 + "0]}"
"""


@pytest.mark.parametrize(
    "source, line",
    [
        ('send(\'{"loaded": false, "raised": [[[[]]]], "text": [1]}\')', "assert f(1) == 1"),
        ("send('[1]')", "assert f(1) == 1"),
        ("send('{\"loaded\": true}')\nsend('{\"value\": ' + MANY + '}')\ntime.sleep(9)", "assert f(f(1)) == 1"),
        (
            "send('{\"loaded\": true}')\nsend('{\"value\": 0, \"args\": [[' + MANY + ']]}')\ntime.sleep(9)",
            "x = [1]\nf(x)\nassert f(x)",
        ),
    ],
)
def test_an_answer_that_speaks_for_itself_cannot_make_the_tests_look_wrong(sandbox, source, line):
    verdict = sandbox.functions([RAW + source + "\ndef f(x): return x"], "f", asserts(line))
    assert not verdict.passed and verdict.cause == "ended", verdict


@pytest.mark.parametrize(
    "source, line, passed",
    [
        ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == x, [1, 2]))", False),
        ("def f(x): return 10**6000", "assert f(2) == 4, f(2)", False),
        ("def f(x: Lst[int]): return x", "assert f(1) == 1", False),  # the annotation is evaluated, as Python does
        ("def f(x): return len(x)", "assert f(list(range(3_000_000))) == 3_000_000", True),  # larger than a reply may be
    ],
)
def test_what_crosses_ends_no_loop_and_no_process(sandbox, source, line, passed):
    before = sandbox.cells.restarts
    verdict = sandbox.functions([source], "f", asserts(line), time_limit_s=5.0)
    assert verdict.passed == passed and verdict.detail != "it ends the process that runs the tests", verdict
    assert sandbox.cells.restarts == before


def test_an_answer_that_kills_its_tests_fails_alone(sandbox):
    tests = asserts("import os\nif f(1): os._exit(0)\nassert False")
    verdict = sandbox.functions(["def f(x): return x"], "f", tests)
    assert not verdict.passed and verdict.cause == "ended"


DEEP = """
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(2**26)
def f(n): return 0 if n == 0 else 1 + f(n - 1)
thread = threading.Thread(target=lambda: print(f(50000)))
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    "source, given, wanted",
    [
        ("n = int(input())\nprint(n * 2)", "21\n", "42"),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "1 2 3", "6"),
        ("import sys\nfor line in sys.stdin.buffer: sys.stdout.buffer.write(line.upper())", "ä\nb\n", "ä\nB"),
        ("print(open(0).read())", "x y", "x y"),
        ("import os\nos.write(1, b'direct')", "", "direct"),
        ("if __name__ == '__main__':\n    print(input())\n    raise SystemExit", "a", "a"),
        ("import threading\nt = threading.Thread(target=lambda: print('late'))\nt.start()", "", "late"),
        (DEEP, "", "50000"),
        ("import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))", "", "3"),
        ("import json, re, sqlite3, zlib, decimal, ssl, multiprocessing, subprocess, random\nprint(1)", "", "1"),
        ("print(1)\nexit()", "", "1"),
        ("print('x' * 300_000)", "", "x" * 300_000),
        ("import atexit\natexit.register(print, 'end')", "", "end"),
        ("import sys\nprint(1)\nsys.exit(False)", "", "1"),
        ("import sys\nprint(1)\nsys.stdout.close()", "", "1"),
        ("import io, sys\nout, sys.stdout = sys.stdout, io.StringIO()\nprint()\nout.write('1')", "", "1"),
        ("import sys\nsys.__stdout__.write('1')\nclass O: flush = print\nsys.stdout = O\nO.flush = lambda: None", "", "1"),
    ],
)  # fmt: skip
def test_programs_run_as_python_runs_them(sandbox, source, given, wanted):
    verdict = sandbox.program([source], given, wanted)
    assert verdict.passed, verdict


def test_programs_may_use_numpy_and_in_a_strong_sandbox_a_scratch_folder(sandbox):
    source = "import numpy as np\nimport numpy.linalg\nprint(np.linalg.det(np.eye(3)) + np.arange(4).sum())"
    assert sandbox.program([source], "", "7").passed
    verdict = sandbox.program(["open('a', 'w').write('b')\nprint(open('a').read())"], "", "b")
    assert verdict.passed == sandbox.strong


@pytest.mark.parametrize(
    "source, cause",
    [
        ("print(1)\nraise SystemExit(3)", "ended"), ("print(1)\n1 / 0", "ended"), ("print(2)", "wrong"), ("prin(", "syntax"),
        ("print(1)\nwhile True: pass", "timeout"), ("import os\nos.close(1)\nimport time\ntime.sleep(50)", "timeout"),
        ("print('x' * 10**8)", "output"), ("import os\nos.kill(os.getpid(), 9)\nprint(2)", "ended"),
    ],
)  # fmt: skip
def test_a_program_s_failure_has_its_cause(sandbox, source, cause):
    verdict = sandbox.program([source], "", "1", time_limit_s=0.5)
    assert not verdict.passed and verdict.cause == cause, verdict


def test_a_killed_stem_costs_nothing():
    with Sandbox("auto", packages=()) as sandbox:
        if sandbox.level == "bubblewrap":
            pytest.skip("it has none")
        assert sandbox.program(["print(1)"], "", "1").passed
        psutil.Process(sandbox.cells.source.process.pid).kill()
        assert sandbox.program(["print(1)"], "", "1").passed and sandbox.cells.restarts == 1
        stem = psutil.Process(sandbox.cells.source.process.pid)
        for warden in stem.children():
            warden.kill()
        assert sandbox.functions(["def f(): return 1"], "f", asserts("assert f() == 1")).passed
        stem = psutil.Process(sandbox.cells.source.process.pid)
        processes = [stem, *stem.children(recursive=True)]
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def test_a_sandbox_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc") else 0
    sandbox = Sandbox("auto", packages=())
    for _ in range(5):
        assert sandbox.program(["open('x', 'w').write('x')"], "", "1").passed is False
        assert sandbox.functions(["def f(): return 1"], "f", asserts("assert f() == 1")).passed
    sandbox.close()
    sandbox.close()
    assert os.listdir(tmp_path) == []
    assert not files or len(os.listdir("/proc/self/fd")) <= files


def test_modes():
    with pytest.raises(ConfigError, match="auto, strict, weak"):
        Sandbox("medium")
    try:
        with Sandbox("strict", packages=()) as sandbox:
            assert sandbox.strong
    except SandboxError as error:
        assert "bubblewrap" in str(error) and "namespaces:" in str(error)


CAGED = """
import logging, sys
from rlpipe.sandbox import kernel
from rlpipe.errors import SandboxError
kernel.unshare(kernel.CLONE_NEWUSER)
try:
    open("/proc/self/setgroups", "w").write("deny")
    open("/proc/self/uid_map", "w").write("0 {uid} 1")
    open("/proc/self/gid_map", "w").write("0 {gid} 1")
    open("/proc/sys/user/max_user_namespaces", "w").write("0")
except OSError as error:
    print("SKIP", error)
    sys.exit()
logging.basicConfig(format="LOG %(message)s", stream=sys.stdout)
from rlpipe.sandbox.sandbox import Sandbox
try:
    Sandbox("strict", packages=())
except SandboxError as error:
    print("STRICT", error)
with Sandbox("auto", packages=()) as sandbox:
    print("AUTO", sandbox.level, sandbox.program(["print(1)"], "", "1").passed)
"""


def test_where_no_namespace_can_be_made_strict_refuses_and_auto_warns():
    """In a user namespace that may have none below it: as in most containers."""
    try:
        subprocess.run(["unshare", "-U", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user namespaces here: all the other tests run in a weak sandbox already")
    code = CAGED.format(uid=os.getuid(), gid=os.getgid())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.stdout.startswith("SKIP"):
        pytest.skip(done.stdout)
    lines = {line.split(" ", 1)[0]: line for line in done.stdout.splitlines()}
    assert "namespaces: " in lines["STRICT"] and "bwrap" in lines["STRICT"] and "apt-get install bubblewrap" in lines["STRICT"]
    assert lines["AUTO"] in ("AUTO landlock True", "AUTO limits True"), done.stdout + done.stderr
    assert "weaker than it should be" in lines["LOG"]


def test_calls_that_linux_refuses_say_why(caplog):
    caplog.set_level(logging.WARNING)
    with pytest.raises(OSError, match="mount .* on /no/such/place"):
        kernel.mount("none", "/no/such/place", "tmpfs")
