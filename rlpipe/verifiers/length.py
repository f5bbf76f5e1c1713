"""A soft limit on the length of a response."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from rlpipe.errors import ConfigError
from rlpipe.trajectory import Prompt


def verify(prompt: Prompt, response: str, *, limit: int = 2048, buffer: int = 512, tokenizer: str = "") -> dict[str, float]:
    """reward 0 up to `limit` - `buffer`, from there in a straight line down to -1 at `limit`, and -1 beyond; size: the length.

    Lengths are in characters, or in the tokens of a folder's tokenizer.json. DAPO's over-long penalty (arXiv 2503.14476) for a
    text; of what was sampled, up to the budget of the run, `algo.overlong=soft` takes the same from the trajectory. Raises
    ConfigError if the numbers make no sense or the tokenizer cannot be read.
    """
    if not 0 < buffer <= limit:
        raise ConfigError(f"verifier.options: buffer={buffer} must be above 0 and at most limit={limit}")
    size = len(_tokenizer(tokenizer).encode(response, add_special_tokens=False).ids) if tokenizer else len(response)
    return {"reward": -min(1.0, max(0.0, (size - (limit - buffer)) / buffer)), "size": size}


@cache
def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise ConfigError(f"verifier.options.tokenizer={folder}: {path} cannot be read: {error}") from error
