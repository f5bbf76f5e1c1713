"""The entry: `python -m rlpipe.bench NAME [key=value …]`. Exit codes as of `rlpipe.run`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable

from rlpipe.errors import ConfigError, DataError, ModelError, RlpipeError


def _rollout(arguments: list[str]) -> None:
    from rlpipe.bench.rollout import main

    main(arguments)


def _learner(arguments: list[str]) -> None:
    from rlpipe.bench.learner import main

    main(arguments)


def _presets(arguments: list[str]) -> None:
    from rlpipe.bench.presets import main

    main(arguments)


def _verifiers(arguments: list[str]) -> None:
    from rlpipe.bench.verifiers import main

    main(arguments)


def _guided(arguments: list[str]) -> None:
    from rlpipe.bench.guided import main

    main(arguments)


def _driver(arguments: list[str]) -> None:
    from rlpipe.bench.driver import main

    main(arguments)


def _overlap(arguments: list[str]) -> None:
    from rlpipe.bench.overlap import main

    main(arguments)


def _sync(arguments: list[str]) -> None:
    from rlpipe.bench.sync import main

    main(arguments)


BENCHES: dict[str, Callable[[list[str]], None]] = {
    "rollout": _rollout,
    "learner": _learner,
    "presets": _presets,
    "verifiers": _verifiers,
    "guided": _guided,
    "driver": _driver,
    "sync": _sync,
    "overlap": _overlap,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a bench; returns the process's exit code. Every expected failure is one message with its remedy."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _bench(arguments)(arguments[1:])
    except (ConfigError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RlpipeError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _bench(arguments: list[str]) -> Callable[[list[str]], None]:
    known = ", ".join(BENCHES)
    if not arguments:
        raise ConfigError(f"say which bench: {known}")
    if arguments[0] not in BENCHES:
        near = difflib.get_close_matches(arguments[0], BENCHES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no bench '{arguments[0]}'; known are {known}; did you mean {near}?")
    return BENCHES[arguments[0]]


if __name__ == "__main__":
    sys.exit(main())
