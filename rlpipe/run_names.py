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
    numbered = []
    for path in home.glob(f"{_literal(run_id)}*"):
        found = re.fullmatch(re.escape(run_id) + r"(?:-(\d+))?", path.name)
        if found and path.is_dir() and _id_in(path) == run_id:
            numbered.append((int(found[1] or 1), path))
    return [path for _, path in sorted(numbered)]


def free_folder(home: Path, name: str) -> Path:
    """`home/name`, or the first of `name-2`, `name-3` … that does not exist."""
    candidates = itertools.chain([name], (f"{name}-{copy}" for copy in itertools.count(2)))
    return next(path for path in (home / candidate for candidate in candidates) if not path.exists())


def _id_in(folder: Path) -> str | None:
    """What config.yaml says; None if it is not there or broken, as a crash may leave it."""
    try:
        said = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf8"))
        return said["run_id"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)
