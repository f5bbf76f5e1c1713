"""The shape of the code: floors, sizes, names, and what must not be called."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from rlpipe import schema

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlpipe"
FILES = sorted(PACKAGE.rglob("*.py"))
CONFIG_LEAVES = 181  # every new one is a decision
FLOORS = (  # imports go down only; units of one floor do not import each other
    {"errors"},
    {"trajectory", "config", "voting", "user_code", "sandbox", "model_shapes", "usage", "interruption", "run_names"},
    {"bundles", "actor_slot", "server_settings"},
    {"placement"},
    {"cluster", "schema", "decoder_presets", "objective_presets", "placement_rules", "overlap_rules"},
    {"actor_dispatch", "contradictions"},
    {"actor_pool"},
    {"models", "serving"},
    {"sampling", "objectives", "verifiers", "data", "transport"},
    {"monitor", "warm_start", "parity", "checkpoint", "recipe"},
    {"rollout", "learner"},
    {"collection", "evaluation", "plan", "stage", "weight_sync", "supervise", "turns"},
    {"feed", "crew"},
    {"driver"},
    {"run"},
    {"eval"},
    {"sft"},
    {"bench"},
)
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
WAITS = {"ray.get", "ray.wait"}
GLOBAL_SEEDING = {
    "torch.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "torch.random.manual_seed",
}
GLOBAL_SEEDING |= {
    "random.seed",
    "np.random.seed",
    "numpy.random.seed",
    "transformers.set_seed",
    "set_seed",
    "seed_everything",
}


def unit_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"), str(path))


def imported(nodes) -> set[str]:
    """Dotted names of the modules that import statements among `nodes` load."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def runs_at_import(tree: ast.Module):
    """Nodes outside function bodies and TYPE_CHECKING blocks."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        stack.extend(ast.iter_child_nodes(node))


def units_imported(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imported(ast.walk(tree_of(path))) if name.startswith("rlpipe.")}
    return names - {"__version__"}


def calls(path: Path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def test_every_module_has_a_floor():
    units = {unit_of(path) for path in FILES} - {"__init__"}
    assert units <= FLOOR_OF.keys(), f"give {units - FLOOR_OF.keys()} a floor"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    unit = unit_of(path)
    if unit == "__init__":
        assert units_imported(path) == set()
        return
    for other in units_imported(path) - {unit}:
        assert other in FLOOR_OF, f"{unit} imports {other}, which has no floor"
        assert FLOOR_OF[other] < FLOOR_OF[unit], f"{unit} (floor {FLOOR_OF[unit]}) imports {other} (floor {FLOOR_OF[other]})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short_and_well_named(path):
    lines = path.read_text(encoding="utf8").splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
    words = set(path.stem.split("_"))
    assert not words & {"util", "utils", "helper", "helpers", "misc", "common"}
    assert tree_of(path).body and ast.get_docstring(tree_of(path)), "a module says what it is"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_global_seeding_and_no_bare_wait(path):
    for node, name in calls(path):
        assert name not in GLOBAL_SEEDING, f"line {node.lineno}: {name} seeds a global generator; make one of your own"
        if path != PACKAGE / "cluster.py":
            assert name not in WAITS, f"line {node.lineno}: {name} without name and deadline; use rlpipe.cluster.wait"


def test_nothing_is_left_half_done():
    for path in FILES:
        text = path.read_text(encoding="utf8")
        for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X"):
            assert mark not in text, f"{path}: {mark}"
        for handler in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)):
            assert handler.type is not None, f"{path}:{handler.lineno}: a bare except"
            silent = all(isinstance(statement, ast.Pass) for statement in handler.body)
            broad = ast.unparse(handler.type) in ("Exception", "BaseException")
            assert not (silent and broad), f"{path}:{handler.lineno}: a failure is swallowed"


def test_the_number_of_config_leaves_is_frozen():
    assert len(schema.keys()) == CONFIG_LEAVES


def loaded_by(module: str, *suspects: str) -> str:
    code = f"import sys, {module}; print(*[name for name in {suspects!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_is_light():
    heavy = (
        "ray",
        "deepspeed",
        "vllm",
        "wandb",
        "torch",
        "transformers",
        "omegaconf",
        "rich",
        "reasoning_gym",
        "numpy",
    )
    assert loaded_by("rlpipe", *heavy) == ""


def test_the_entry_is_light_until_a_run_starts():
    assert loaded_by("rlpipe.run", "ray", "deepspeed", "vllm", "wandb", "torch", "transformers") == ""


@pytest.mark.parametrize("module", ["rlpipe.data.registry", "rlpipe.verifiers.registry", "rlpipe.verifiers.worker"])
def test_data_and_verifiers_load_no_torch(module):
    assert loaded_by(module, "torch", "transformers", "ray", "deepspeed") == ""


@pytest.mark.parametrize("unit", ["data", "verifiers"])
def test_data_and_verifiers_never_import_torch(unit):
    for path in FILES:
        if unit_of(path) == unit:
            assert not {name.split(".")[0] for name in imported(ast.walk(tree_of(path)))} & {"torch", "transformers"}


@pytest.mark.parametrize("unit", ["sampling", "objectives", "data"])
def test_pure_parts_import_neither_ray_nor_deepspeed(unit):
    for path in FILES:
        if unit_of(path) == unit:
            assert not {name.split(".")[0] for name in imported(ast.walk(tree_of(path)))} & {"ray", "deepspeed"}


def test_optional_packages_are_loaded_where_they_are_used():
    for path in FILES:
        names = {name.split(".")[0] for name in imported(runs_at_import(tree_of(path)))}
        assert not names & {"wandb", "vllm", "reasoning_gym", "math_verify", "omegaconf", "rich", "ray"}, path
