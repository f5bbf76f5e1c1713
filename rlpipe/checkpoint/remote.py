"""Checkpoints where there is no rename: an object store, or whatever else fsspec reaches by a URL.

Files go under their final name one by one, and `complete.json`, the list of them, goes last: without it a checkpoint does not
count. So an upload that was cut off is nothing but space, which the next one frees.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlpipe.checkpoint import manifest
from rlpipe.checkpoint.folders import commit, name_of, step_of
from rlpipe.errors import CheckpointError

log = logging.getLogger("rlpipe")


@contextmanager
def _said(what: str) -> Iterator[None]:
    """What a store raises, each its own kind, becomes a CheckpointError that says what was tried."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


def is_url(path: str) -> bool:
    return "://" in path


class Remote:
    """The checkpoints of one run under a URL; steps are whole numbers. Raises CheckpointError if the URL's kind is unknown or
    needs a package; every method raises it for what the store refuses."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.fs, self.root = connect(self.url)

    def complete(self) -> list[int]:
        """Steps of complete checkpoints, in order."""
        return sorted(step for step in self._steps() if self._has(step))

    def written(self, step: int) -> float:
        """When a complete checkpoint was made, in seconds since 1970; 0 if its list is damaged."""
        try:
            return float(self._list(step).get("written", 0.0))
        except CheckpointError as error:
            log.warning("%s", error)
            return 0.0

    def upload(self, folder: Path) -> None:
        """A complete local checkpoint."""
        step, files = step_of(folder.name), manifest.read(folder)["files"]
        with _said(f"{folder} could not be copied to {self.url}"):
            self._remove(step)
            for name in files:
                target = self._path(step, name)
                self.fs.makedirs(os.path.dirname(target), exist_ok=True)
                self.fs.put_file(str(folder / name), target)
            self.fs.put_file(str(folder / manifest.NAME), self._path(step, manifest.NAME))

    def download(self, step: int, home: Path) -> Path:
        """A complete checkpoint as the folder home/step_…; a damaged one stays in the `.partial` folder for the next sweep."""
        partial = home / f"{name_of(step)}.partial"
        files = self._list(step)["files"]
        with _said(f"{self.url}/{name_of(step)} could not be copied to {home}"):
            for name in (*files, manifest.NAME):
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(self._path(step, name), str(target))
            wrong = manifest.damage(partial)
            if wrong:
                raise CheckpointError(wrong.replace(str(partial), f"{self.url}/{name_of(step)}"))
            return commit(partial)

    def rotate(self, newest: int, keep: int) -> None:
        """As `folders.rotate`; unfinished uploads go too."""
        with _said(f"old checkpoints under {self.url} could not be removed"):
            kept = [step for step in self.complete() if step <= newest][-max(1, keep) :]
            for step in self._steps():
                if step not in kept:
                    self._remove(step)

    def _steps(self) -> list[int]:
        with _said(f"{self.url} cannot be listed"):
            self.fs.invalidate_cache()
            try:
                names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]
            except FileNotFoundError:
                return []
            return sorted(step for step in map(step_of, names) if step is not None)

    def _has(self, step: int) -> bool:
        with _said(f"{self.url} cannot be read"):
            return self.fs.exists(self._path(step, manifest.NAME))

    def _list(self, step: int) -> dict[str, Any]:
        path = self._path(step, manifest.NAME)
        with _said(f"{path} cannot be read"):
            return manifest.parse(lambda: self.fs.cat_file(path), f"{self.url}/{name_of(step)}/{manifest.NAME}")

    def _remove(self, step: int) -> None:
        """The list first: half a checkpoint must not count."""
        path = self._path(step, manifest.NAME)
        if self.fs.exists(path):
            self.fs.rm_file(path)
        if self.fs.exists(self._path(step)):
            self.fs.rm(self._path(step), recursive=True)

    def _path(self, step: int, name: str = "") -> str:
        return f"{self.root}/{name_of(step)}/{name}".rstrip("/")


def connect(url: str) -> tuple[Any, str]:
    """(file system of fsspec, path in it). Raises CheckpointError, with the remedy."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise CheckpointError(f"checkpoint.path={url}: {error}; pip install the package that it names") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"checkpoint.path={url}: {error}. Give a folder, or a URL that fsspec knows") from error


def runs_under(url: str) -> list[str]:
    """Names of the runs that have a folder under the URL of a recipe."""
    fs, root = connect(url.rstrip("/"))
    with _said(f"checkpoint.path: {url} cannot be listed"):
        try:
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(root, detail=False))
        except FileNotFoundError:
            return []
