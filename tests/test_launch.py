"""The launch scripts with a stub in place of Python and pip: what they install, when, and what they run."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
STUB = """#!/usr/bin/env bash
if [ "$1" = "-c" ]; then exec {python} "$@"; fi
echo "$0 $*" >> {log}
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
if [ "$1 $2" = "-m pip" ] && [ -n "${{FAIL_PIP:-}}" ]; then exit 1; fi
"""


class Checkout:
    """A copy of what the scripts need, with stub interpreters that write down how they were called."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder / "checkout", folder / "calls.txt"
        shutil.copytree(ROOT / "launch", self.folder / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.folder)
        self.stubs = folder / "stubs"
        self.stub(self.stubs / "python3")

    def stub(self, path: Path, text: str = STUB) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(python=sys.executable, log=self.log))
        path.chmod(0o755)

    def active(self) -> dict[str, str]:
        """Variables of an active virtual environment."""
        environment = self.log.parent / "active"
        self.stub(environment / "bin" / "python")
        return {"VIRTUAL_ENV": str(environment)}

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        """The finished process, and the calls of this run without the interpreter's folder."""
        self.log.write_text("")
        environment = {"PATH": f"{self.stubs}:/usr/bin:/bin", "HOME": str(self.log.parent)} | variables
        command = ["bash", str(self.folder / "launch" / script), *arguments]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60)
        return done, self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_first_run_makes_an_environment_and_installs(checkout):
    done, calls = checkout.run("quickstart.sh", "seed=1")
    assert done.returncode == 0, done.stderr
    python = f"{checkout.folder}/.venv/bin/python"
    assert calls == [
        f"{checkout.stubs}/python3 -m venv {checkout.folder}/.venv",
        f"{python} -m pip install --quiet --disable-pip-version-check --editable .",
        f"{python} -m rlpipe.run recipe=quickstart seed=1",
    ]


def test_the_second_run_installs_nothing(checkout):
    checkout.run("quickstart.sh")
    done, calls = checkout.run("quickstart.sh", "recipe=quickstart_full")
    assert [call.partition(" ")[2] for call in calls] == ["-m rlpipe.run recipe=quickstart recipe=quickstart_full"]
    assert done.stderr == ""


def test_an_active_environment_is_used(checkout):
    active = checkout.active()
    done, calls = checkout.run("quickstart.sh", **active)
    assert done.returncode == 0, done.stderr
    assert len(calls) == 2 and all(call.startswith(f"{active['VIRTUAL_ENV']}/bin/python -m") for call in calls)
    assert not (checkout.folder / ".venv").exists()
    assert len(checkout.run("quickstart.sh", **active)[1]) == 1


def test_tests_install_their_extra_once_and_serve_the_quickstart_too(checkout):
    active = checkout.active()
    _, calls = checkout.run("test.sh", "-k", "sudoku", **active)
    assert [call.partition(" ")[2] for call in calls] == [
        "-m pip install --quiet --disable-pip-version-check --editable .[dev]",
        "-m pytest -k sudoku",
    ]
    assert len(checkout.run("test.sh", **active)[1]) == 1
    assert len(checkout.run("quickstart.sh", **active)[1]) == 1
    plain = Checkout(checkout.log.parent / "other")
    plain.run("quickstart.sh")
    assert len(plain.run("test.sh")[1]) == 2, "the tests need more than the quickstart installed"


def test_changed_requirements_are_installed(checkout):
    checkout.run("quickstart.sh")
    (checkout.folder / "pyproject.toml").write_text("# changed\n" + (ROOT / "pyproject.toml").read_text())
    assert len(checkout.run("quickstart.sh")[1]) == 2


def test_a_failed_installation_is_tried_again(checkout):
    done, calls = checkout.run("quickstart.sh", FAIL_PIP="1")
    assert done.returncode == 1 and "error: the installation failed" in done.stderr
    assert not any("rlpipe.run" in call for call in calls)
    assert any("-m pip install" in call for call in checkout.run("quickstart.sh")[1])


def test_a_chosen_torch_is_installed_first(checkout):
    _, calls = checkout.run("quickstart.sh", RLPIPE_TORCH="torch==2.13.0+cpu")
    installs = [call.partition("version-check ")[2] for call in calls if "-m pip" in call]
    assert installs == ["torch==2.13.0+cpu", "--editable ."]


def test_an_old_python_is_refused_with_the_remedy(checkout):
    old = '#!/usr/bin/env bash\nif [ "$1" = --version ]; then echo Python 3.9.2; exit; fi\nexit 1\n'
    for name in ("python3", "python", "python3.11", "python3.12", "python3.13"):
        checkout.stub(checkout.stubs / name, old)
    done, _ = checkout.run("quickstart.sh")
    assert done.returncode == 1
    assert "error: no Python 3.11 or newer" in done.stderr and "Python 3.9.2" in done.stderr
    checkout.stub(checkout.log.parent / "stale" / "bin" / "python", old)
    done, _ = checkout.run("quickstart.sh", VIRTUAL_ENV=str(checkout.log.parent / "stale"))
    assert done.returncode == 1 and "deactivate it" in done.stderr


def test_the_run_s_exit_code_is_the_script_s(checkout):
    checkout.run("quickstart.sh")
    checkout.stub(checkout.folder / ".venv/bin/python", 'if [ "$1" = "-c" ]; then exec {python} "$@"; fi\nexit 7\n')
    assert checkout.run("quickstart.sh")[0].returncode == 7


def test_no_script_names_a_registry_or_a_path_of_one_machine():
    for script in SCRIPTS:
        text = script.read_text(encoding="utf8")
        for word in ("index-url", "https://", "pypi", "/root", "/home"):
            assert word not in text, f"{script.name}: {word}"


def test_the_package_ships_its_recipes_and_all_its_modules():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
    tool = project["tool"]["setuptools"]
    assert tool["package-dir"]["rlpipe.recipes"] == "recipes" and tool["package-data"]["rlpipe.recipes"] == ["*.yaml"]
    packages = {str(path.parent.relative_to(ROOT)).replace(os.sep, ".") for path in (ROOT / "rlpipe").rglob("*.py")}
    assert set(tool["packages"]) == packages | {"rlpipe.recipes"}
    assert project["project"]["requires-python"] == ">=3.11"
    assert set(project["project"]["optional-dependencies"]) == {"benchmarks", "smollm2", "vllm", "dev"}
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf8")
