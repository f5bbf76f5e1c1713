"""`python -m rlpipe.models inspect PATH|ID [key=value …]`: what a model is and whether it will work.

Exit codes: 0 it will work, 2 it will not, or the command is wrong.
"""

from __future__ import annotations

import json
import sys

from rlpipe.errors import RlpipeError

USAGE = """usage: python -m rlpipe.models inspect PATH|ID [--json] [revision= family= block_size= attention= mask_token_id=]

PATH: a model folder; ID: OWNER/NAME on the hub, fetched into the local cache if it is not there. The settings are those of a
recipe's `model` section. Exit code 0 if the model will work, 2 if not."""
INTEGERS = ("block_size", "mask_token_id")
TEXTS = ("revision", "family", "attention")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if "-h" in arguments or "--help" in arguments:
        print(USAGE)
        return 0
    as_json = "--json" in arguments
    words = [word for word in arguments if word != "--json"]
    given = [word for word in words[1:] if "=" not in word]
    if words[:1] != ["inspect"] or len(given) != 1:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        settings = dict(_setting(word) for word in words[1:] if "=" in word)
        from rlpipe.models.inspection import inspect, text

        found = inspect(given[0], **settings)
    except (RlpipeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if as_json else text(found))
    return 0 if found.works else 2


def _setting(word: str) -> tuple[str, str | int]:
    key, _, value = word.partition("=")
    key = key.removeprefix("model.")
    if key not in (*INTEGERS, *TEXTS):
        raise ValueError(f"{word}: settings are {', '.join((*TEXTS, *INTEGERS))}")
    return key, int(value) if key in INTEGERS else value


if __name__ == "__main__":
    sys.exit(main())
