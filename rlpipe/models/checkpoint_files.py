"""The weight files of a model folder: what is in them by their headers alone, and one tensor at a time.

Needs no torch until a tensor is read, so a folder of any size can be looked at in milliseconds. Format: a safetensors file is
eight bytes of header length (little endian), that much JSON (name → dtype, shape, data_offsets), then the bytes; several of
them are joined by an index that maps names to files.
"""

from __future__ import annotations

import json
import math
import operator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpipe.errors import ModelError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_THE_MODEL = ("adapter_model.safetensors", "value_head.safetensors")  # they may stand beside its weights
OLD_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
MAX_HEADER = 100_000_000  # bytes, as the reference reader has it


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file. dtype as safetensors writes it (F32, BF16 …)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class WeightFiles:
    """The tensors of a folder by name. Use it as a context: files that were read from are closed at its end."""

    def __init__(self, folder: str | Path):
        """Reads all headers. Raises ModelError for a folder without safetensors, an index that names what is not there, and a
        file that is shorter or longer than its header says (a download that broke off)."""
        self.folder = Path(folder)
        self.files, index = _weight_files(self.folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for name, stored in read_header(file).items():
                if name in self.tensors:
                    raise ModelError(f"tensor {name} is both in {self.tensors[name].file} and in {file.name}; remove one file")
                self.tensors[name] = stored
        for name, file in index.items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise ModelError(f"{self.folder / INDEX} says that {name} is in {file}, and it is not. Fetch the folder again")
        self._stack, self._open = ExitStack(), {}

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *error) -> None:
        self._open.clear()
        self._stack.close()

    @property
    def parameters(self) -> int:
        return sum(stored.numel for stored in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """On disk, headers included."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of elements of each dtype, most common first."""
        found: dict[str, int] = {}
        for stored in self.tensors.values():
            found[stored.dtype] = found.get(stored.dtype, 0) + stored.numel
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in the dtype that it is stored in. It may share memory with the file: copy before writing."""
        from safetensors import SafetensorError, safe_open

        file = self.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: {name} cannot be read: {error}. Fetch this file again") from error


def read_header(file: Path) -> dict[str, Stored]:
    """Tensors of a safetensors file without their data. Raises ModelError if it cannot be one, or is truncated."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ModelError(
                f"{file} is no safetensors file, or a truncated one: {size} bytes, and it declares a header of {length}. "
                "Fetch it again"
            )
        raw = stream.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        placed = {name: _placed(file, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: its header is damaged ({type(error).__name__}: {error}). Fetch it again") from error
    for begin, end, stored in placed.values():
        if end - begin != stored.numel * BYTES.get(stored.dtype, -1) and stored.dtype in BYTES:
            raise ModelError(f"{file}: its header is damaged (a {stored.dtype} of {stored.shape} in {end - begin} bytes)")
    declared = 8 + length + max((end for _, end, _ in placed.values()), default=0)
    if declared != size:
        raise ModelError(
            f"{file} has {size} bytes and its header declares {declared}: it is "
            f"{'truncated' if size < declared else 'longer than it should be'}. Fetch it again"
        )
    return {name: stored for name, (_, _, stored) in placed.items()}


def _placed(file: Path, entry: dict[str, Any]) -> tuple[int, int, Stored]:
    begin, end = map(operator.index, entry["data_offsets"])
    return begin, end, Stored(file, str(entry["dtype"]), tuple(map(operator.index, entry["shape"])))


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """(safetensors files of the model, the index's names → file names; empty without an index)."""
    path = folder / INDEX
    if path.is_file():
        try:
            where = json.loads(path.read_text(encoding="utf8"))["weight_map"]
            names = sorted(set(where.values()))
            missing = [name for name in names if not (folder / name).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} is damaged ({type(error).__name__}: {error}). Fetch it again") from error
        if missing:
            raise ModelError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing, first {missing[0]}: a download that broke "
                "off? Fetch the folder again"
            )
        return [folder / name for name in names], where
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    found = sorted(file for file in folder.glob("*.safetensors") if file.name not in NOT_THE_MODEL)
    if len(found) == 1 and "-of-" not in found[0].name:
        return found, {}
    if found:
        raise ModelError(f"{folder} holds {len(found)} weight files and no {INDEX} that joins them. Fetch that file too")
    old = sorted(file.name for pattern in OLD_FORMATS for file in folder.glob(pattern))
    if old:
        raise ModelError(
            f"{folder} has its weights in {old[0]}; only safetensors are read, because loading such a file can run code. "
            "Fetch the safetensors version, or convert it once where you trust it: torch.load(FILE, weights_only=True), then "
            "safetensors.torch.save_file(weights, 'model.safetensors')"
        )
    raise ModelError(f"{folder} holds no weights: no {SINGLE} and no {INDEX}")
