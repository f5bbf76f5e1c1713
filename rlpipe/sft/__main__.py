"""The entry: `python -m rlpipe.sft recipe=NAME [key=value …]`, `… convert from=FOLDER to=FOLDER`, `… collect recipe=NAME`.

Exit codes as of `rlpipe.run`: 0 done, 1 the run failed, 2 the recipe, the data or the model is not usable, 130 interrupted.
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

from rlpipe.contradictions import CONVERTED_BLOCK_SIZE
from rlpipe.errors import ConfigError
from rlpipe.run import main

CONVERT_USAGE = "python -m rlpipe.sft convert from=FOLDER to=FOLDER [block_size=4]   (from=smollm2: SmolLM2-135M-Instruct)"


def command(arguments: list[str]) -> int:
    """Train, convert or collect, whichever the first word says."""
    word = next((argument for argument in arguments[:1] if "=" not in argument and not argument.startswith("-")), "")
    if word == "convert":
        return convert(arguments[1:])
    if word == "collect":
        from rlpipe.sft.collect import collect

        return collect(arguments[1:])
    if word:
        near = difflib.get_close_matches(word, ("convert", "collect"), 1, 0.0)[0]
        raise ConfigError(f"'{word}' is no command; did you mean {near}? Training needs none: recipe=NAME")
    from rlpipe.sft.training import run

    return run(arguments)


def convert(arguments: list[str]) -> int:
    """`from=FOLDER to=FOLDER block_size=N`: an autoregressive checkpoint as a diffusion LM; see `models.conversion`."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = sorted(given.keys() - {"from", "to", "block_size"})
    if unknown or not given.get("from") or not given.get("to"):
        raise ConfigError(f"{unknown[0]}: there is no such setting. {CONVERT_USAGE}" if unknown else CONVERT_USAGE)
    size = given.get("block_size", str(CONVERTED_BLOCK_SIZE))
    if not size.isdigit():
        raise ConfigError(f"block_size={size}: a whole number; 0 means full attention. {CONVERT_USAGE}")
    from rlpipe.models.conversion import SMOLLM2, convert, fetched

    target = Path(given["to"])
    source = fetched(given["from"], target.parent) if given["from"] == SMOLLM2 else Path(given["from"])
    spec = convert(source, target, int(size))
    print(f"{target}: {spec.to_dict()}\nadapt it: python -m rlpipe.sft recipe=… model.path={target}")
    return 0


if __name__ == "__main__":
    code = main(command=command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # worker threads of torch and W&B may linger; everything of ours is closed by now
