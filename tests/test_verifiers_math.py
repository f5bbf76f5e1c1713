"""Mathematical answers: pairs with traps, hostile ones, and the process that judges them."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from math_pairs import BOXED, PUBLISHED, WHOLE

from rlpipe.errors import VerifierFailed
from rlpipe.trajectory import Prompt
from rlpipe.verifiers import math as verifier
from rlpipe.verifiers.judge import Judge, UnreadableReference
from rlpipe.verifiers.numerals import numeral, same_number, tidy

pytest.importorskip("math_verify")


def verdict(reference, response, **options):
    return verifier.verify(Prompt(uid="m/1", task="t", text="", answer={"answer": reference}), response, **options)


@pytest.mark.parametrize("kind", BOXED)
def test_boxed_answers(kind):
    wrong = [
        (reference, answer, right)
        for reference, answer, right in BOXED[kind]
        if verdict(reference, f"\\boxed{{{answer}}}", seconds=1.0)["reward"] != right
    ]
    assert not wrong


@pytest.mark.parametrize("reference, response, right", WHOLE)
def test_whole_responses(reference, response, right):
    assert verdict(reference, response)["reward"] == right


def test_there_are_enough_pairs():
    assert sum(map(len, BOXED.values())) + len(WHOLE) >= 200


def test_the_published_table():
    """All of it but two: a reference that is empty is a broken record and not a right answer, and (1,2) is not 12."""
    assert all(verdict(reference, f"\\boxed{{{answer}}}")["reward"] == right for reference, answer, right in PUBLISHED)
    assert verdict("(1,2)", r"\boxed{12}")["reward"] == 0
    with pytest.raises(UnreadableReference, match="m/1 cannot be read"):
        verdict("", "")


def test_where_the_answer_stands_can_be_said():
    assert verdict("5", r"<answer>6</answer> \boxed{5}", extract="boxed")["reward"] == 1
    assert verdict("5", r"\boxed{5} so 7", extract="last_line")["reward"] == 1
    assert verdict("5", "the answer is 5", extract="boxed")["reward"] == 0, "a search can be hedged, a box cannot"
    assert verdict("5", "5 or 6\n5", extract="last_line")["reward"] == 1


@pytest.mark.parametrize("answer", [r"\sum_{n=1}^{10^{9}} \sin(n)^{n}", r"(x+1)^{500} (x+2)^{500}"])
def test_an_answer_that_takes_too_long_is_wrong_and_counted(answer):
    started = time.monotonic()
    assert verdict("5", f"\\boxed{{{answer}}}", seconds=0.5) == {"reward": 0.0, "timeout": 1.0}
    assert time.monotonic() - started < 60
    assert verdict("x^2", r"\boxed{x \cdot x}") == {"reward": 1.0, "timeout": 0.0}, "the judge is as good as new"


def test_a_reference_that_takes_too_long_is_no_fault_of_the_answer():
    with pytest.raises(UnreadableReference, match="takes more than 0.3 s"):
        verdict(r"\sum_{n=1}^{10^{9}} \sin(n)^{n}", r"\boxed{y+1}", seconds=0.3)


PIECES = [
    *r"\frac \dfrac \sqrt \boxed \text \left( \right) \begin{pmatrix} \end{pmatrix} \int \sum_{n=1}^{\infty} \lim".split(),
    *r"\binom \pm \cup \in \infty \pi \sin \log \times 10^ ^ _ { } ( ) [ ] , . ; = < > + - * / ! % $ $$ & \\ |".split(),
    *r"\( \) \[ \] 0 1 2 7 9 99 12345 1e9 0.5 x y n e i a and or answer is <answer> </answer>".split(),
    *" \n\x00é½\ud800",
]


def fuzzed(rng: random.Random) -> str:
    kind, length = rng.randrange(5), rng.choice((3, 10, 30, 100))
    text = "".join(rng.choice(PIECES) for _ in range(length))
    if kind == 0:
        return text
    if kind == 1:
        return f"\\boxed{{{text}}}"
    if kind == 2:  # towers
        return "\\boxed{" + "^".join(rng.choice(("9", "99", "x", "{9}", "10")) for _ in range(length // 2 + 2)) + "}"
    if kind == 3:  # depth
        return "\\boxed{" + rng.choice(("(", "{", "[", "\\frac{", "\\sqrt{", "-", "!", "9!")) * length + text + "}"
    return "".join(chr(rng.randrange(32, 0x3000)) for _ in range(length)) + text


def test_no_hang_on_a_thousand_fuzzed_strings():
    rng, slow = random.Random(0), []
    references = ("5", "x^2+1", r"\frac{1}{2}", "(1,2)")
    for _ in range(1000):
        text, reference = fuzzed(rng), rng.choice(references)
        started = time.thread_time()
        assert verdict(reference, text, seconds=0.3)["reward"] == 0, text
        slow += [text] if time.thread_time() - started > 2 else []
    assert not slow, "what runs outside the judge has no limit, so it must be quick"


def test_numbers_are_compared_without_the_library():
    for one, other, same in (("1,000", "1000", True), ("1/2", "0.5", True), ("1/2", "0.51", False), ("1/3", "0.3333333", None)):
        assert same_number(numeral(tidy(one)), numeral(tidy(other))) is same
    for text in ("x", "1,00", "12:30", "3m", "1e999", "2/0", "--5", "5 apples", "", "1" * 200):
        assert numeral(tidy(text)) is None, text


@pytest.fixture
def judge():
    made = Judge()
    yield made
    made.close()


def test_a_judge_works_off_the_main_thread_and_outlives_its_child(judge):
    found = []
    threads = [threading.Thread(target=lambda: found.append(judge.compare("$x+y$", "$y+x$", 5.0))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == ["right"] * 3
    with open(f"/proc/{judge.process.pid}/task/{judge.process.pid}/children", encoding="ascii") as file:
        (child,) = map(int, file.read().split())
    os.kill(child, signal.SIGKILL)
    assert judge.compare("$x+y$", "$y-x$", 5.0) == "wrong", "a child that is killed from outside costs nothing"


ORPHAN = """
import os, signal
from rlpipe.verifiers.judge import Judge
judge = Judge()
assert judge.compare("$1$", "$1$", 5.0) == "right"
print(judge.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_judge_ends_with_the_process_that_made_it():
    found = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=120)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{found.stdout.strip()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found.stdout.strip().isdigit() and not Path(f"/proc/{found.stdout.strip()}").exists()


def test_a_judge_that_is_gone_is_a_failure_once(judge):
    assert judge.compare("$1$", "$1$", 5.0) == "right"
    judge.process.kill()
    judge.process.wait()
    with pytest.raises(VerifierFailed, match="judge of mathematical answers"):
        judge.compare("$1$", "$1$", 5.0)
    assert judge.compare("$1$", "$1$", 5.0) == "right"


def test_a_judge_that_cannot_start_says_why(judge, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such luck')", encoding="utf8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(VerifierFailed, match="no such luck"):
        judge.compare("$1$", "$1$", 5.0)


def test_a_judge_whose_answer_does_not_come_is_ended(judge):
    judge.compare("$1$", "$1$", 5.0)
    process = judge.process
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(VerifierFailed, match="in vain"):
        judge.compare("$1$", "$2$", 0.05)
    assert process.poll() is not None


def test_an_answer_that_the_library_fails_at_is_wrong_and_a_reference_is_a_failure(judge, monkeypatch, tmp_path):
    faulty = """
def parse(text, **options):
    if "boom" in text:
        raise RuntimeError("a bug")
    return [text]


def verify(gold, found, **options):
    return True
"""
    (tmp_path / "math_verify.py").write_text(faulty, encoding="utf8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert judge.compare("$1$", "$boom$", 5.0) == "overtime" and judge.compare("$1$", "$1$", 5.0) == "right"
    with pytest.raises(VerifierFailed, match="RuntimeError: a bug"):
        judge.compare("$boom$", "$1$", 5.0)


def test_a_library_that_reads_no_latex_is_not_taken_for_wrong_answers(judge, monkeypatch, tmp_path):
    broken = "def parse(*args, **options):\n    return []\n\n\ndef verify(*args, **options):\n    return False\n"
    (tmp_path / "math_verify.py").write_text(broken, encoding="utf8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(VerifierFailed, match="cannot read LaTeX here"):
        judge.compare("$1$", "$1$", 5.0)
