"""What an evaluation's numbers depend on, as hashes and facts that survive a move to another machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpipe.models.checkpoint_files import WeightFiles
from rlpipe.trajectory import Prompt

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "tiktoken.model")
CHUNK = 1 << 24  # bytes


def weights_hash(folder: str | Path) -> dict[str, Any]:
    """{"blake2b": …, "tensors": …, "parameters": …} of a model folder: BLAKE2b-128 over name, dtype, shape and bytes of every
    tensor in the order of their names, one tensor in memory at a time. How they are spread over files does not matter.
    Raises ModelError for files that are damaged or missing."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    with WeightFiles(folder) as files:
        for name in sorted(files.tensors):
            stored = files.tensors[name]
            digest.update(json.dumps([name, stored.dtype, list(stored.shape)]).encode())
            flat = files.read(name).reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(flat), CHUNK):
                digest.update(memoryview(flat[start : start + CHUNK]))
        return {"blake2b": digest.hexdigest(), "tensors": len(files.tensors), "parameters": files.parameters}


def tokenizer_hash(folder: str | Path) -> str:
    """BLAKE2b-128 over the tokenizer's files, their names included."""
    digest = hashlib.blake2b(digest_size=16)
    for name in TOKENIZER_FILES:
        path = Path(folder) / name
        if path.is_file():
            data = path.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """BLAKE2b-128 over everything that the model and the verifier are given, in order."""
    return content_hash([asdict(prompt) for prompt in prompts])


def content_hash(value: Any) -> str:
    """BLAKE2b-128 of plain JSON data, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf8", "surrogatepass"), digest_size=16).hexdigest()
