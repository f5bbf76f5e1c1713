"""Recipes: short YAML files over the schema of `rlpipe.config`, with dotted overrides. Nothing unknown gets through."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe import schema
from rlpipe.config import RunConfig
from rlpipe.contradictions import check, decoder_of_eval
from rlpipe.decoder_presets import preset_settings
from rlpipe.errors import ConfigError
from rlpipe.objective_presets import algo_settings
from rlpipe.schema import flat, flatten

__all__ = ["check", "decoder_of_eval", "differences", "document", "fingerprint", "load", "to_yaml"]

# Settings that may change when a run is resumed: they move, stop or show it, and leave its numbers alone.
NOT_IN_THE_NUMBERS = (
    "rollout.slots", "name", "description", "run_id", "resume", "dry_run", "output_dir", "steps", "monitor", "cluster", "eval",
    "checkpoint", "parity.max_abs_delta", "rollout.workers", "rollout.cpus", "rollout.timeout_s", "rollout.retries",
    "verifier.workers", "verifier.cpus", "verifier.batch_size", "verifier.timeout_s", "verifier.retries",
    "verifier.max_failed_groups",
    "learner.cpus", "learner.bucket_mb", "learner.timeout_s", "learner.restarts", "rollout.min_workers", "rollout.transport",
    "judge.url", "judge.gpus", "judge.cpus", "judge.key_env", "judge.start_timeout_s",
    "guide.url", "guide.gpus", "guide.cpus", "guide.key_env", "guide.start_timeout_s",
)  # fmt: skip

# What a task brings besides its name, and what stands there without.
OF_A_TASK: dict[str, Any] = {"train": "", "test": "", "format": "auto", "options": {}}


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one file or override says. lines: dotted key → line, empty for an override."""

    source: str
    tree: Any
    lines: Mapping[str, int]

    def place(self, key: str) -> str:
        """`recipes/mine.yaml:12` or `command line`."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.source}:{self.lines[key]}" if key else self.source


def load(arguments: Sequence[str], start: Any = None, root: type = RunConfig) -> Any:
    """`recipe=NAME|path.yaml key=value …` → an instance of `root`; the last of several values for a key counts.

    A recipe may name a `base` recipe, which is merged first. start: an instance of `root` that lies under everything; with
    one a recipe need not be named. Raises ConfigError: unknown recipe or key (with the nearest one and, in a file, the
    line), wrong type, malformed override, bases in a circle.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides, path = dict(split(argument) for argument in arguments), None
    if "recipe" in overrides:
        path = _find(overrides.pop("recipe"), Path())
    elif start is None:
        raise ConfigError(f"say which recipe: recipe=NAME or recipe=path.yaml. Known: {', '.join(sorted(_known()))}")
    layers = _layers(path, ()) if path else []
    merged = OmegaConf.structured(root if start is None else start)
    for layer in [*layers, _command_line(overrides, root)]:
        merged = _merge(merged, layer, root)
    try:
        cfg = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{error.full_key or path}: {str(error).splitlines()[0]}") from error
    if path and "name" in schema.keys(root):
        cfg.name = cfg.name or path.stem
    return cfg


def split(argument: str) -> tuple[str, str]:
    """(key, value) of one override. Raises ConfigError unless it is key=value."""
    key, equals, value = argument.partition("=")
    if not equals or not key or key != key.strip():
        raise ConfigError(f"'{argument}' is not key=value; write for example recipe=quickstart learner.lr=1e-4")
    return key, value


def _folders() -> list[Path]:
    """Where named recipes are looked for: ./recipes, the checkout's, the ones installed with the package."""
    here = Path(__file__).resolve().parent
    return [Path("recipes"), here.parent / "recipes", here / "recipes"]


def _known() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def _find(name: str, folder: Path) -> Path:
    """The file of a recipe by name or path; a relative path counts from `folder`."""
    known = _known()
    if name.endswith((".yaml", ".yml")):
        if (folder / name).is_file():
            return folder / name
    elif name in known:
        return known[name]
    near = difflib.get_close_matches(Path(name).stem, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else "."
    what = f"there is no file {folder / name}" if name.endswith((".yaml", ".yml")) else "there is no such recipe"
    raise ConfigError(f"recipe={name}: {what}{hint} Known: {', '.join(sorted(known))}; or give a path ending in .yaml")


def _layers(path: Path, above: tuple[Path, ...]) -> list[_Layer]:
    """The recipe's bases, then the recipe itself. A base's own `name` is not inherited."""
    if path.resolve() in [other.resolve() for other in above]:
        raise ConfigError(f"recipes build on each other in a circle: {' → '.join(str(p) for p in (*above, path))}")
    layer = _read(path)
    base = layer.tree.pop("base", None)
    if above:
        layer.tree.pop("name", None)
    if base is None:
        return [layer]
    if not isinstance(base, str):
        raise ConfigError(f"{layer.place('base')}: base={base} must be the name or the path of another recipe")
    return [*_layers(_find(base, path.parent), (*above, path)), layer]


def _read(path: Path) -> _Layer:
    import yaml
    from omegaconf import OmegaConf

    try:
        text = path.read_text(encoding="utf8")
        tree = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from error
    if node is None:  # nothing but comments
        return _Layer(str(path), OmegaConf.create({}), {})
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} must hold keys and values")
    lines: dict[str, int] = {}

    def walk(mapping: yaml.MappingNode, prefix: str) -> None:
        for key, value in mapping.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")

    walk(node, "")
    return _Layer(str(path), tree, lines)


def _command_line(overrides: Mapping[str, str], root: type) -> _Layer:
    """All overrides as one layer, so that their order does not matter: a preset never replaces a key given beside it."""
    from omegaconf import OmegaConf

    tree = OmegaConf.create({})
    for key, value in overrides.items():
        layer = _override(key, value, root)
        _check_keys(layer, root)
        tree = OmegaConf.merge(tree, layer.tree)
    return _Layer("command line", tree, {})


def _override(key: str, value: str, root: type) -> _Layer:
    """One override. A text is taken as it stands unless it is quoted: `1e5`, `yes` or nothing mean themselves."""
    import yaml
    from omegaconf import OmegaConf

    known = schema.keys(root).get(key)
    if known is not None and known.type == "str" and value[:1] not in ("'", '"'):
        tree = OmegaConf.create({})
        OmegaConf.update(tree, key, value)
        return _Layer("command line", tree, {})
    try:
        return _Layer("command line", OmegaConf.from_dotlist([f"{key}={value}"]), {})
    except yaml.YAMLError as error:
        raise ConfigError(f"command line: {key}={value}: the value is not YAML: {error}") from error


def _merge(cfg: Any, layer: _Layer, root: type) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    said = _check_keys(layer, root)
    for key in [key for key, value in said.items() if value is None and key in schema.sections(root)]:
        OmegaConf.update(layer.tree, key, {})  # a section with every line commented out
    for key, value in _of_another_task(cfg, said).items():
        OmegaConf.update(cfg, key, value, merge=False)
    other = said.get("eval.decoder")
    if isinstance(other, Mapping) and other.get("preset"):  # a named decoder is whole: nothing of an earlier layer stays
        OmegaConf.update(cfg, "eval.decoder", {}, merge=False)
    for section, settings_of in (("rollout.decoder", preset_settings), ("algo", algo_settings)):
        if said.get(f"{section}.preset"):
            _expand_preset(cfg, layer, section, settings_of)
    try:
        return OmegaConf.merge(cfg, layer.tree)
    except OmegaConfBaseException as error:
        key = (error.full_key or "").partition("[")[0]
        about = schema.keys(root).get(key)
        expected = f"expected {about}" if about else str(error).splitlines()[0]
        value = said.get(key)
        raise ConfigError(f"{layer.place(key)}: {key}={value!r} ({type(value).__name__}): {expected}") from error


def _check_keys(layer: _Layer, root: type) -> dict[str, Any]:
    """Dotted key → value of a layer. Raises ConfigError for a key that is unknown, or a section that is given a value."""
    from omegaconf import OmegaConf

    said = flatten(OmegaConf.to_container(layer.tree), root=root)
    for key, value in said.items():
        if not schema.is_known(key, root):
            raise ConfigError(f"{layer.place(key)}: there is no key {key}{schema.suggestion(key, root)} (help=true lists all)")
        if key in schema.sections(root) and value is not None and not isinstance(value, Mapping):
            inside = ", ".join(name for name in schema.keys(root) if name.startswith(f"{key}."))
            raise ConfigError(f"{layer.place(key)}: {key}={value}: {key} is a section; its keys are {inside}")
        for name, item in value.items() if isinstance(value, Mapping) else ():
            if item is None and ":" in str(name):
                raise ConfigError(f"{layer.place(key)}: {key}.{name} has no value; put a space behind the colon: {{a: 1}}")
    return said


def _of_another_task(cfg: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of earlier layers that fall with their task when a layer names another one, or a mixture: what they name would
    be refused, or, like the files of records, read under the new task's name."""
    mixed, named = said.get("data.mixture"), "data.task" in said
    fallen = {"data.mixture": []} if mixed or named else {}
    if mixed or (named and said["data.task"] != cfg.data.task):
        fallen |= {f"data.{name}": value for name, value in OF_A_TASK.items()}
    return fallen


def _expand_preset(cfg: Any, layer: _Layer, section: str, settings_of: Callable[[str], dict[str, Any]]) -> None:
    """A named decoder or method lies over what earlier layers say and under what this one says beside it."""
    from omegaconf import OmegaConf

    given = OmegaConf.select(layer.tree, section)
    try:
        settings = settings_of(str(given.preset))
    except ConfigError as error:
        raise ConfigError(f"{layer.place(f'{section}.preset')}: {error}") from error
    if "options" in settings:
        OmegaConf.update(cfg, f"{section}.options", {}, merge=False)
    OmegaConf.update(layer.tree, section, OmegaConf.merge(settings, given), merge=False)


def to_yaml(cfg: RunConfig) -> str:
    """The resolved configuration; loads back as a recipe."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _numbers(cfg: RunConfig) -> dict[str, Any]:
    names = tuple(f"{name}." for name in NOT_IN_THE_NUMBERS)
    kept = {key: value for key, value in flat(cfg).items() if not f"{key}.".startswith(names)}
    if cfg.learner.lr_schedule != "constant":
        kept["steps"] = cfg.steps  # the schedule is stretched over them
    return kept


def fingerprint(cfg: RunConfig) -> str:
    """Hash of every setting that affects a run's numbers: 16 hexadecimal digits, the same on every machine."""
    return hashlib.sha256(json.dumps(_numbers(cfg), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs among the settings that affect a run's numbers: 'key: old → new'."""
    before, after = _numbers(old), _numbers(new)
    keys = [*before, *(k for k in after if k not in before)]
    return [f"{k}: {before.get(k)} → {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def document() -> str:
    """How to start a run, the known recipes, and all keys with type, default and comment, for `help=true`."""
    usage = "python -m rlpipe.run recipe=NAME [key=value …]"
    return "\n".join([usage, f"recipes: {', '.join(sorted(_known()))}", "keys:", schema.document()])
