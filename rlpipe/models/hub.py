"""Where a model's files are: a folder, or the local copy of a hub id. Nothing that is fetched is ever executed."""

from __future__ import annotations

import re
from pathlib import Path

from rlpipe.errors import ModelError
from rlpipe.model_shapes import is_hub_id, local_folder

# Weights, tokenizer, configuration. A model's own Python files are fetched as text and never imported: an export puts them back
# beside the weights, for tools that run them.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py")
UNWANTED = ("*/*",)  # other formats of the same weights live in folders
IN_CACHE = re.compile(r".*/models--(?P<owner>.+?)--(?P<name>.+?)/snapshots/(?P<revision>[0-9a-f]{40})/?")


def model_folder(path: str | Path, revision: str = "") -> Path:
    """The folder with the model's files; a hub id is fetched into the local cache, unless it is there.

    revision: branch, tag or commit of a hub id, empty for its main branch. The folder of a cached hub id that is missing on
    this machine (another node of a cluster) is fetched here too, the same commit. Raises ModelError with what to fetch and how.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    cached = IN_CACHE.fullmatch(str(path))
    if cached:
        return fetch(f"{cached['owner']}/{cached['name']}", cached["revision"])
    if not is_hub_id(path):
        raise ModelError(
            f"model.path={path}: there is no such folder (so no config.json there). Give a folder with a saved model, a hub id "
            "OWNER/NAME, or tiny:block or tiny:full"
        )
    return fetch(str(path), revision)


def fetch(hub_id: str, revision: str = "") -> Path:
    """Fetch what is not in the cache yet. Raises ModelError if that is not possible and the cache has it not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    known = local_folder(hub_id, revision)
    try:
        return Path(
            snapshot_download(hub_id, revision=revision or None, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED))
        )
    except HFValidationError as error:
        raise ModelError(f"model.path={hub_id} is no hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if known is not None:  # the hub cannot be asked whether its main branch has moved
            return known
        raise ModelError(
            f"model.path={hub_id}: there is no such folder, and as a hub id it is not in the local cache and could not be "
            f"fetched ({_first_line(error)}). On a machine with a network run: {fetch_command(hub_id, revision)}; then copy "
            "its cache here (HF_HOME says where it is), or give the folder itself: model.path=FOLDER. A gated model needs "
            "`hf auth login`"
        ) from error


def fetch_command(hub_id: str, revision: str = "") -> str:
    return f"hf download {hub_id}{f' --revision {revision}' if revision else ''}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
