"""What the folders of one run are called: its run_id and, when an attempt began anew because nothing was saved, run_id-2,
run_id-3 …"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import yaml


def folders_of(home: Path, run_id: str) -> list[Path]:
    """The folders below `home` that runs of this id made, oldest first. One whose config.yaml names another id is somebody
    else's, whatever it is called."""
    found = [(attempt(path.name, run_id), path) for path in home.glob(f"{_literal(run_id)}*")]
    return [path for number, path in sorted(found) if number and path.is_dir() and own_id(path) == run_id]


def own_id(folder: Path) -> str | None:
    """The run_id that continues a run: the one it was given; what it is called, if it was given none. None for a folder whose
    config.yaml is not there or broken, as a crash may leave it."""
    try:
        said = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf8"))
        return said["run_id"] or folder.name
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def attempt(name: str, run_id: str) -> int:
    """1 for run_id itself, 2 for run_id-2 …; 0 for what no run of this id is called."""
    found = re.fullmatch(re.escape(run_id) + r"(?:-(\d+))?", name)
    return int(found[1] or 1) if found else 0


def free_folder(home: Path, name: str) -> Path:
    """`home/name`, or the first of `name-2`, `name-3` … that does not exist."""
    candidates = itertools.chain([name], (f"{name}-{copy}" for copy in itertools.count(2)))
    return next(path for path in (home / candidate for candidate in candidates) if not path.exists())


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)
