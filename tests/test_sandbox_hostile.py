"""Programs that want out, or a reward they did not earn. Each of tests/hostile defines `attack()`, whose result is its claim.

What is wanted is a secret that an attack can only know by reading where it must not, or a word it may only say after it did
what it must not; the rest is looked at from outside: files, listeners, a process that attacks try to kill. Every program runs
both as an answer under tests and as a program under its output. One test shows that the bait is real: unconfined, it is taken.
"""

import contextlib
import hashlib
import os
import secrets
import socket
import string
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rlpipe.errors import SandboxError
from rlpipe.sandbox.confinement import STRONG
from rlpipe.sandbox.limits import Limits
from rlpipe.sandbox.sandbox import Sandbox

HOSTILE = Path(__file__).parent / "hostile"
PROGRAMS = {f"{path.parent.name}/{path.stem}": path.read_text(encoding="utf8") for path in sorted(HOSTILE.rglob("*.py"))}
LIMITS = Limits(cpu_s=0.9, wall_s=3.0, memory_mb=512, scratch_mb=8)
LEVELS = ("namespaces", "bubblewrap", "landlock")
BARE = ("read_secret", "read_environment", "read_by_symlink", "read_command_lines", "tcp", "unix_socket", "abstract_socket",
        "run_program", "read_by_proc_root")  # fmt: skip
WITHOUT_ISOLATION = "verdict/"
HUNT = """
def hunt(text):
    import re
    found = re.search(r"canary-[0-9a-f]{32}", text if isinstance(text, str) else text.decode("latin1"))
    return found and found.group()
"""
VICTIM = """
import sys, time
kept = bytearray(b"{secret}" + bytes(4000))
import ctypes
print(ctypes.addressof(ctypes.c_char.from_buffer(kept)), flush=True)
time.sleep(100000)
"""


class Bait:
    """A secret in a file, an environment, a command line, another process's memory, and behind four kinds of socket."""

    def __init__(self, folder: Path):
        self.folder, self.secret, self.won = folder, f"canary-{secrets.token_hex(16)}", f"won-{secrets.token_hex(16)}"
        self.mark, self.visitors = secrets.token_hex(4), []
        (folder / "secret.txt").write_text(self.secret)
        environment = {**os.environ, "SECRET": self.secret}
        command = [sys.executable, "-c", VICTIM.format(secret=self.secret), self.secret]
        self.victim = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        address = int(self.victim.stdout.readline())
        name = f"rlpipe-{self.mark}"
        self.lines = {
            "tcp": socket.create_server(("127.0.0.1", 0)),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "unix": _bound(socket.SOCK_STREAM, str(folder / "s")),
            "abstract": _bound(socket.SOCK_STREAM, "\0" + name),
            "unix_dgram": _bound(socket.SOCK_DGRAM, str(folder / "s.dgram")),
            "abstract_dgram": _bound(socket.SOCK_DGRAM, f"\0{name}.dgram"),
        }
        self.lines["udp"].bind(("127.0.0.1", 0))
        for kind, line in self.lines.items():
            threading.Thread(target=self._listen, args=(kind, line), daemon=True).start()
        ports = {kind: self.lines[kind].getsockname()[1] for kind in ("tcp", "udp")}
        paths = {"folder": str(folder), "unix": str(folder / "s"), "abstract": name, "python": sys.executable}
        pids = {"victim": self.victim.pid, "judge": os.getpid(), "address": address}
        self.facts = {**ports, **paths, **pids, "won": self.won, "mark": self.mark}
        self.before = self.state()

    def _listen(self, kind, line):
        with contextlib.suppress(OSError):
            while True:
                if line.type == socket.SOCK_DGRAM:
                    line.recv(100)
                else:
                    visitor, _ = line.accept()
                    visitor.sendall(self.secret.encode())
                    visitor.close()
                self.visitors.append(kind)

    def state(self) -> dict:
        """What attacks try to change."""
        library = Path(os.__file__).parent
        names = ("/", "/root", "/etc", "/usr", "/usr/lib", "/var/tmp", "/dev/shm", "/run", "/home")
        places = [self.folder, *map(Path, names)]
        files = {str(path): _digest(path) for path in (self.folder / "secret.txt", Path(os.__file__), Path(string.__file__))}
        status = (self.folder / "secret.txt").stat()
        return {
            "files": files,
            "listing": sorted(os.listdir(self.folder)),
            "mode": (status.st_mode, status.st_uid, status.st_mtime),
            "escaped": [str(place) for place in [*places, library] if (place / f"escaped-{self.mark}").exists()],
            "customized": (library / "sitecustomize.py").exists(),
            "visitors": list(self.visitors),
            "victim": psutil.Process(self.victim.pid).status() in ("sleeping", "running") and self.victim.poll() is None,
        }

    def text(self, name: str) -> str:
        return f"FACTS = {self.facts!r}\n{HUNT}\n{PROGRAMS[name]}\n"

    def close(self):
        self.victim.kill()
        self.victim.wait()
        for line in self.lines.values():
            line.close()


def _bound(kind: int, name: str) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, kind)
    line.bind(name)
    if kind == socket.SOCK_STREAM:
        line.listen()
    return line


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def bait(tmp_path_factory):
    made = Bait(tmp_path_factory.mktemp("bait"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def outcome_of(bait):
    """level → {(program, role): (verdict, the verdict of a good program right after)}; each level runs once, all at once."""
    ran: dict[str, dict | str] = {}

    def run(level: str) -> dict:
        if level not in ran:
            try:
                ran[level] = _attack_all(Sandbox(level, LIMITS, packages=()), bait)
            except SandboxError as error:
                ran[level] = str(error)
        if isinstance(ran[level], str):
            pytest.skip(f"sandbox {level} cannot run here: {ran[level][:300]}")
        return ran[level]

    return run


def _attack_all(sandbox: Sandbox, bait: Bait) -> dict:
    def attack(job):
        name, role = job
        source = bait.text(name)
        if role == "program":
            verdict = sandbox.program([source + "print(attack())\n"], "1\n2\n", bait.secret)
        else:
            tests = {"kind": "asserts", "setup": "", "asserts": [f"assert attack() in {(bait.secret, bait.won)!r}"]}
            verdict = sandbox.functions([source], "attack", tests)
        good = {"kind": "asserts", "setup": "", "asserts": ["assert twice([1, 2]) == [1, 2, 1, 2]"]}
        return job, (verdict, sandbox.functions(["def twice(x):\n    return x * 2"], "twice", good))

    jobs = [(name, role) for name in PROGRAMS for role in ("answer", "program")]
    if sandbox.level != "namespaces":  # the same filter and limits again: one role each will do
        jobs = [job for i, job in enumerate(jobs) if i % 4 in (0, 3)]
    with sandbox, ThreadPoolExecutor(4) as pool:
        outcomes = dict(pool.map(attack, jobs))
        outcomes["restarts"] = sandbox.cells.restarts
    outcomes["state"] = bait.state()
    return outcomes


def test_there_are_enough_of_them():
    assert len(PROGRAMS) >= 60


@pytest.mark.parametrize("name", BARE)
def test_unconfined_the_bait_is_taken(bait, name, tmp_path):
    source = bait.text(f"escape/{name}") + "print(attack())\n"
    environment = {**os.environ, "SECRET": bait.secret}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    bait.visitors.clear()
    assert done.stdout.strip() == bait.secret, done.stderr[-500:]


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("level", LEVELS)
def test_no_escape_and_no_reward(outcome_of, bait, level, name):
    outcomes = outcome_of(level)
    for role in ("answer", "program"):
        if (name, role) in outcomes:
            verdict, good = outcomes[name, role]
            assert not verdict.passed and verdict.cause, (role, verdict)
            assert bait.secret not in verdict.detail and bait.won not in verdict.detail, (role, verdict)
            assert verdict.cause != "syntax", "the attack itself does not compile"
            assert good.passed, (role, good)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_outside_has_changed(outcome_of, bait, level):
    outcomes = outcome_of(level)
    bait.before["visitors"] = []
    assert outcomes["state"] == bait.before
    assert outcomes["restarts"] == 0, "an attack reached the process that starts the others"


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_lives_on(outcome_of, level):
    outcome_of(level)
    deadline = time.monotonic() + 20
    while left := [p for p in psutil.process_iter(["cmdline"]) if _ours(p)]:
        assert time.monotonic() < deadline, f"still there 20 s after their sandbox was closed: {left}"
        time.sleep(0.1)


def _ours(process: psutil.Process) -> bool:
    """Started by the sandbox of this test process: they are its descendants, or were, and then have no parent but the first."""
    if "rlpipe.sandbox.start" not in " ".join(process.info["cmdline"] or ()):
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        ancestors = {parent.pid for parent in process.parents()}
        return os.getpid() in ancestors or not ancestors - {1}
    return False


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.startswith(WITHOUT_ISOLATION)])
def test_false_verdicts_earn_nothing_even_without_isolation(bait, weakest, name):
    """Where no strong sandbox can run, this part still does."""
    source = bait.text(name)
    tests = {"kind": "asserts", "setup": "", "asserts": [f"assert attack() in {(bait.secret, bait.won)!r}"]}
    assert not weakest.functions([source], "attack", tests).passed


@pytest.fixture(scope="module")
def weakest():
    try:
        strong = Sandbox("strict", LIMITS, packages=())
    except SandboxError:
        strong = None
    if strong is not None:
        strong.close()
        assert strong.level in STRONG
        pytest.skip("the whole suite ran in a strong sandbox")
    with Sandbox("weak", LIMITS, packages=()) as sandbox:
        yield sandbox
