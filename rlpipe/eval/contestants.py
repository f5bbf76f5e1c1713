"""The decoders of an evaluation: from names and mappings to settings that fit the model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlpipe.config import DecoderConfig
from rlpipe.contradictions import check_decoder, decoder_with
from rlpipe.decoder_presets import PRESETS
from rlpipe.errors import ConfigError
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.decoder import Decoder

OWN = "rollout"  # the name of rollout.decoder as it stands


@dataclass(frozen=True, slots=True)
class Member:
    """One decoder that prompts are put to. key: 16 hexadecimal digits of everything that shapes its responses."""

    config: DecoderConfig
    settings: dict[str, Any]
    key: str


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table. members: one decoder, or for HEX one for each of the block lengths `hex`."""

    label: str
    members: tuple[Member, ...]
    hex: tuple[int, ...] = ()


def contestants(
    entries: Sequence[Any], base: DecoderConfig, hex_lengths: Sequence[int], spec: DiffusionSpec, model: str
) -> list[Contestant]:
    """The rows that `decoders=` asks for. base: rollout.decoder, whose max_tokens, temperature, top_p and top_k named decoders
    keep · hex_lengths: of `hex=` · model: its path, for messages. Raises ConfigError for what no decoder has, what contradicts
    the model (with the named decoders that fit), and two rows of one name."""
    _check_lengths("hex", hex_lengths)
    wanted = [_entry(entry, base, f"decoders[{index}]") for index, entry in enumerate(entries or [OWN])]
    wanted += [(f"{label}, HEX", config, tuple(hex_lengths)) for label, config, own in wanted if hex_lengths and not own]
    rows = [_contestant(label, config, lengths, base, spec, model) for label, config, lengths in wanted]
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"decoders: two are called '{label}'; give one of them another `label`")
    return rows


def fitting(base: DecoderConfig, spec: DiffusionSpec) -> list[str]:
    """Named decoders that the model can be sampled with."""
    found = []
    for name in PRESETS:
        try:
            Decoder.resolve(decoder_with(base, {"preset": name}, name), spec)
        except ConfigError:
            continue
        found.append(name)
    return found


def _entry(entry: Any, base: DecoderConfig, name: str) -> tuple[str, DecoderConfig, tuple[int, ...]]:
    """(label, settings, block lengths of HEX or none) of one element of `decoders=`."""
    if isinstance(entry, str):
        entry = {"preset": entry}
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"{name}={entry!r}: a named decoder, or a mapping of settings such as {{preset: NAME, threshold: 0.8}}"
        )
    changes = dict(entry)
    label, lengths = changes.pop("label", ""), changes.pop("hex", [])
    _check_lengths(f"{name}.hex", lengths)
    if changes.get("preset") == OWN:
        changes.pop("preset")
    try:
        config = decoder_with(base, changes, name)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    parts = [changes.pop("preset", OWN), *(f"{key}={value}" for key, value in changes.items())]
    parts += [f"HEX {list(lengths)}"] if lengths else []
    return str(label) or " ".join(parts), config, tuple(lengths)


def _check_lengths(name: str, lengths: Any) -> None:
    """ConfigError unless they are different block lengths; one that came twice would have two votes."""
    whole = isinstance(lengths, Sequence) and not isinstance(lengths, str) and all(type(n) is int and n > 0 for n in lengths)
    if not whole or len(set(lengths)) < len(lengths):
        raise ConfigError(f"{name}={lengths!r}: different block lengths of at least 1, for example [8, 16, 32]")


def _contestant(
    label: str, config: DecoderConfig, lengths: tuple[int, ...], base: DecoderConfig, spec: DiffusionSpec, model: str
) -> Contestant:
    if lengths and spec.attention == "block":
        raise ConfigError(
            f"decoders: {label} votes over block lengths {list(lengths)}, and {model} attends in blocks of {spec.block_size}, "
            "which are its only ones; HEX needs full attention"
        )
    configs = [dataclasses.replace(config, block_size=length) for length in lengths] or [config]
    return Contestant(label, tuple(_member(label, each, base, spec, model) for each in configs), lengths)


def _member(label: str, config: DecoderConfig, base: DecoderConfig, spec: DiffusionSpec, model: str) -> Member:
    try:
        check_decoder(f"decoders: {label}", config, spec.block_size)
        decoder = Decoder.resolve(config, spec)
    except ConfigError as error:
        kind = f"blocks of {spec.block_size}" if spec.attention == "block" else "full attention"
        said = str(error).removeprefix(f"decoders: {label}").lstrip(".: ")
        raise ConfigError(
            f"decoders: {label} does not fit {model} ({kind}): {said}. Named decoders that fit it: "
            f"{', '.join(fitting(base, spec))}"
        ) from error
    settings = decoder.settings()
    numbers = json.dumps({key: value for key, value in settings.items() if key != "preset"}, sort_keys=True)
    return Member(config, settings, hashlib.blake2b(numbers.encode(), digest_size=8).hexdigest())
