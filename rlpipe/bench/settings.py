"""`key=value` arguments of a bench: typed by the fields of a dataclass, nothing unknown gets through."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from rlpipe.bench.roofline import H200_TBS, H200_TFLOPS
from rlpipe.config import DecoderConfig
from rlpipe.decoder_presets import decoder_config
from rlpipe.errors import ConfigError

DECODER = "decoder."
BASELINES = {"both": ("sequential", "lockstep"), "sequential": ("sequential",), "lockstep": ("lockstep",), "none": ()}


@dataclass
class RolloutSettings:
    """Beside these, `decoder.KEY=VALUE` sets a key of `DecoderConfig`."""

    model: str = "3m"  # 3m | 30m | 3m:full | 30m:full | tiny:block | tiny:full | sdar-4b | a model folder
    decoder: str = "auto"  # a preset; auto: sdar_static for block attention, llada_low_confidence for full attention
    n: int = 32  # requests
    prompt_len: int = 64  # of the longest prompt; they are drawn from a quarter of it upwards
    max_tokens: int = 128  # of the longest response; likewise
    slots: int = 0  # of the engine; 0: one a request
    repeat: int = 2  # rounds; every contestant runs once a round, and its best round counts
    device: str = "cpu"  # cpu | cuda
    dtype: str = "auto"  # float32 | bfloat16; auto: float32 on a CPU, bfloat16 on a GPU
    threads: int = 0  # of torch; 0: all cores
    seed: int = 0  # of weights, prompts, lengths and noise
    out: str = ""  # a JSON file for the results
    baselines: str = "both"  # both | sequential | lockstep | none
    sequential_n: int = 0  # requests of the sequential baseline, the first ones; 0: all
    peak_tflops: float = H200_TFLOPS  # of the roofline, on a GPU
    bandwidth_tbs: float = H200_TBS  # likewise
    changes: dict[str, Any] = field(default_factory=dict)  # of the preset

    def decoder_config(self, attention: str) -> DecoderConfig:
        """The preset with the changes; greedy unless told otherwise, so that contestants can be compared token by token."""
        name = self.decoder
        if name == "auto":
            name = "sdar_static" if attention == "block" else "llada_low_confidence"
        return decoder_config(name, **{"max_tokens": self.max_tokens, "temperature": 0.0} | self.changes)


@dataclass
class LearnerSettings:
    model: str = "3m"  # as of the rollout bench; block models only
    groups: int = 2  # prompts
    samples: int = 8  # responses to each
    prompt_len: int = 128
    response_len: int = 128
    tokens_per_step: int = 1  # committed in each denoising step of a block
    shrink: int = 1  # denoising steps merged into a row
    token_budget: int = 8192  # of a packed micro-batch
    repeat: int = 2  # rounds; every contestant runs once a round, and its best round counts
    checkpointing: bool = False  # of activations, on both sides
    device: str = "cpu"  # cpu | cuda
    dtype: str = "auto"  # float32 | bfloat16; auto: float32 on a CPU, bfloat16 on a GPU
    threads: int = 0  # of torch; 0: all cores
    seed: int = 0
    out: str = ""  # a JSON file for the results
    baselines: str = "published"  # published | none
    peak_tflops: float = H200_TFLOPS  # of the roofline, on a GPU


@dataclass
class PresetSettings:
    recipe: str = "quickstart_full"
    presets: str = "all"  # or names, with commas between them
    seeds: int = 3  # 0, 1 … of weights, data and noise
    steps: int = 20
    set: str = ""  # more settings of every run, with blanks between them: "learner.lr=1e-4 algo.kl_coef=0"
    output_dir: str = "outputs/presets"
    out: str = ""  # a JSON file for the results


def read(arguments: Sequence[str], kind: type = RolloutSettings) -> Any:
    """Settings of the given dataclass. Raises ConfigError: an argument that is not key=value, an unknown key with the nearest
    one, a value of another type."""
    kinds = {f.name: type(f.default) for f in fields(kind) if f.name != "changes"}
    default = DecoderConfig()
    free = {f"{DECODER}{f.name}": type(getattr(default, f.name)) for f in fields(default) if f.name != "preset"}
    if kind is not RolloutSettings:
        free = {}
    settings = kind()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{argument}' is not key=value; write for example model=30m n=64")
        if key in kinds:
            setattr(settings, key, _typed(key, text, kinds[key]))
        elif key in free:
            settings.changes[key.removeprefix(DECODER)] = _typed(key, text, free[key])
        else:
            near = difflib.get_close_matches(key, [*kinds, *free], n=1, cutoff=0.0)[0]
            known = ", ".join([*kinds, f"{DECODER}KEY"] if free else kinds)
            raise ConfigError(f"there is no key '{key}'; did you mean {near}? Known: {known}")
    _check(settings)
    return settings


def _typed(key: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text}: not a YAML value") from error
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key}={text}: it must be {'a mapping' if kind is dict else f'of type {kind.__name__}'}")
    return value


def _check(settings: Any) -> None:
    for name in (f.name for f in fields(settings) if type(f.default) is int):
        least = 0 if name in ("slots", "threads", "seed", "sequential_n", "zero_stage", "lora") else 1
        if getattr(settings, name) < least:
            raise ConfigError(f"{name}={getattr(settings, name)}: it must be at least {least}")
    if not hasattr(settings, "device"):
        return
    choices = {"device": ("cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16"), "baselines": ("published", "none")}
    if isinstance(settings, RolloutSettings):
        choices["baselines"] = tuple(BASELINES)
        if settings.sequential_n > settings.n:
            raise ConfigError(f"sequential_n={settings.sequential_n}: it must be between 0 (all) and n={settings.n}")
    for name, known in choices.items():
        if getattr(settings, name, known[0]) not in known:
            raise ConfigError(f"{name}={getattr(settings, name)}: known are {', '.join(known)}")
    for name in ("peak_tflops", "bandwidth_tbs"):
        if getattr(settings, name, 1.0) <= 0:
            raise ConfigError(f"{name}={getattr(settings, name)}: it must be above 0")
