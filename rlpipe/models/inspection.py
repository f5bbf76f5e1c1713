"""What a model folder is and whether it will work: everything that can be said without loading its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlpipe.errors import RlpipeError
from rlpipe.model_shapes import Shape, local_folder, shape_of
from rlpipe.models import memory
from rlpipe.models.checkpoint_files import WeightFiles
from rlpipe.models.families import find_family
from rlpipe.models.loading import Recognised, check_tensors, has_tokenizer, load_tokenizer, read_config, recognise

SLOTS, TOKENS, BUDGET, RANKS = 64, 2048, 8192, 8  # what the memory of roles is shown for
MADE = ("tiny:", "convert:")
FULL_BLOCK = 32  # that decoders of models with full attention look at together
BFLOAT16 = 2


@dataclass
class Inspection:
    """What was found; None or empty where it could not be. problems: why it will not work, with the remedy; [] if it will."""

    path: str
    folder: str = ""
    family: str = ""
    architecture: str = ""
    stock_class: str = ""
    parameters: int | None = None
    active_parameters: int | None = None  # that one token meets, of a mixture of experts
    dtypes: dict[str, int] = field(default_factory=dict)  # elements of each
    files: int = 0
    bytes_on_disk: int | None = None
    vocabulary: int | None = None  # rows of the embedding
    tokens: int | None = None  # that the tokenizer knows
    mask: tuple[int, str] | None = None  # id and text
    eos: list[tuple[int, str]] = field(default_factory=list)
    suppressed: list[tuple[int, str]] = field(default_factory=list)
    attention: str = ""
    block_size: int | None = None
    logit_shift: int | None = None
    chat_template: bool | None = None  # None: no tokenizer to ask
    template_note: str = ""
    own_code: list[str] = field(default_factory=list)  # Python files that stand beside the weights
    memory: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def works(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"works": self.works} | asdict(self)


def inspect(path: str, **settings: Any) -> Inspection:
    """settings: keywords of `recognise`. Goes on after a problem as far as it can, so that all of them are told at once."""
    found = Inspection(path)
    if path.startswith(MADE):
        found.problems.append(f"{path} is made when a run starts; dry_run=true of that run shows its size")
        return found
    known = _attempt(found, lambda: recognise(path, **settings))
    folder = known.folder if known else _folder(path, settings.get("revision", ""))
    if folder is None:
        return found
    found.folder = str(folder)
    found.own_code = sorted(file.name for file in folder.glob("*.py"))
    config = known.config if known else _quietly(lambda: read_config(folder)) or {}
    found.architecture = (config.get("architectures") or [str(config.get("model_type", ""))])[0]
    shape = _quietly(lambda: shape_of(config))
    _look_at_files(found, folder, shape)
    _look_at_tokenizer(found, folder, known)
    if known is not None:
        _look_at_model(found, known)
    else:
        family = _quietly(lambda: find_family(config, settings.get("family", "")))
        found.family = family.name if family else ""
    if found.parameters is not None:
        found.memory = {role: [asdict(part) for part in parts] for role, parts in _roles(found, shape).items()}
    return found


def _attempt(found: Inspection, look: Callable[[], Any]) -> Any:
    """What `look` returns; a failure is a problem, told once."""
    try:
        return look()
    except RlpipeError as error:
        if str(error) not in found.problems:
            found.problems.append(str(error))
        return None


def _quietly(look: Callable[[], Any]) -> Any:
    """What `look` returns, None if it fails: for what was told as a problem already."""
    try:
        return look()
    except (RlpipeError, TypeError, ValueError):
        return None


def _folder(path: str, revision: str) -> Path | None:
    return Path(path) if Path(path).is_dir() else local_folder(path, revision)


def _look_at_files(found: Inspection, folder: Path, shape: Shape | None) -> None:
    files = _attempt(found, lambda: WeightFiles(folder))
    if files is None:
        return
    found.parameters, found.dtypes = files.parameters, files.dtypes
    found.files, found.bytes_on_disk = len(files.files), files.nbytes
    if shape is not None and shape.experts:
        found.active_parameters = shape.active


def _look_at_tokenizer(found: Inspection, folder: Path, known: Recognised | None) -> None:
    if not has_tokenizer(folder):
        found.problems.append(f"{folder} has no tokenizer. Put the model's own tokenizer files there")
        return
    tokenizer = known.tokenizer if known else _attempt(found, lambda: load_tokenizer(folder))
    if tokenizer is None:
        return
    found.tokens = len(tokenizer)
    found.chat_template = bool(tokenizer.chat_template)
    if known is None:
        return
    found.mask = _named(tokenizer, known.spec.mask_token_id)
    found.eos = [_named(tokenizer, token) for token in known.spec.eos_token_ids]
    found.suppressed = [_named(tokenizer, token) for token in known.spec.suppressed_ids]
    if not found.mask[1]:
        found.notes.append(f"the tokenizer has no token with MASK's id {found.mask[0]}: fine as long as nothing prints it")
    if not known.spec.eos_token_ids:
        found.notes.append("nothing says which token ends a response: every response fills its budget")
    if not tokenizer.chat_template:
        found.notes.append("no chat template: give the prompt's format with data.template")


def _named(tokenizer, token: int) -> tuple[int, str]:
    return token, tokenizer.convert_ids_to_tokens(token) or ""


def _look_at_model(found: Inspection, known: Recognised) -> None:
    family, spec = known.family, known.spec
    found.family, found.template_note = family.name, family.template
    found.stock_class = family.model_class(known.config).__name__
    found.vocabulary = family.config(known.config).vocab_size
    found.attention, found.block_size, found.logit_shift = spec.attention, spec.block_size, spec.logit_shift
    if found.parameters is not None:
        _attempt(found, lambda: check_tensors(known))


def _roles(found: Inspection, shape: Shape | None) -> dict[str, list[memory.Part]]:
    parameters = found.parameters
    learner = {"stage": 3, "offload": False, "token_budget": BUDGET, "checkpointing": True}
    rows = SLOTS * (found.block_size or FULL_BLOCK)
    return {
        "rollout": memory.rollout_parts(shape, parameters, BFLOAT16, slots=SLOTS, tokens=TOKENS, rows=rows),
        "learner": memory.learner_parts(shape, parameters, BFLOAT16, ranks=1, **learner),
        f"1 of {RANKS}": memory.learner_parts(shape, parameters, BFLOAT16, ranks=RANKS, **learner),
    }


def text(found: Inspection) -> str:
    """For the console."""
    lines = [f"{found.path}: {'will work' if found.works else 'will not work'}"]
    lines += [f"  problem: {problem}" for problem in found.problems]
    lines += [f"  note: {note}" for note in found.notes]
    facts = {
        "folder": found.folder if found.folder != found.path else "",
        "family": _family(found),
        "parameters": _parameters(found),
        "on disk": _disk(found),
        "vocabulary": _vocabulary(found),
        "MASK": _token(found.mask),
        "EOS": ", ".join(map(_token, found.eos)),
        "never sampled": ", ".join(map(_token, found.suppressed)),
        "attention": _attention(found),
        "chat template": _template(found),
        "own code": f"{', '.join(found.own_code)} (kept beside exports, never run)" if found.own_code else "",
    }
    lines += [f"  {name:<14}{fact}" for name, fact in facts.items() if fact]
    if found.memory:
        lines.append(
            f"  memory in bfloat16, estimated: a rollout worker with {SLOTS} slots of {TOKENS} tokens; a learner rank alone, "
            f"and one of {RANKS} at ZeRO 3,\n  with {BUDGET} tokens a micro-batch and activation checkpointing"
        )
        for role, parts in found.memory.items():
            lines += [f"    {line}" for line in memory.table(role, [memory.Part(**part) for part in parts]).splitlines()]
    return "\n".join(lines)


def _family(found: Inspection) -> str:
    if not found.family:
        return f"unknown ({found.architecture or 'no architecture named'})"
    return f"{found.family} ({found.architecture}{f', computed by {found.stock_class}' if found.stock_class else ''})"


def _template(found: Inspection) -> str:
    if found.chat_template is None:
        return ""
    return ("yes" if found.chat_template else "no") + (f"; {found.template_note}" if found.template_note else "")


def _parameters(found: Inspection) -> str:
    if found.parameters is None:
        return ""
    active = f", {found.active_parameters:,} of them for one token" if found.active_parameters else ""
    return f"{found.parameters:,}{active}; stored as {', '.join(found.dtypes)}"


def _disk(found: Inspection) -> str:
    if found.bytes_on_disk is None:
        return ""
    return f"{memory.size(found.bytes_on_disk)} in {found.files} file{'s' if found.files > 1 else ''}"


def _vocabulary(found: Inspection) -> str:
    parts = [f"{found.vocabulary} rows"] if found.vocabulary else []
    return ", ".join(parts + ([f"{found.tokens} tokens in the tokenizer"] if found.tokens else []))


def _token(token: tuple[int, str] | None) -> str:
    return f"{token[0]} {token[1]}".rstrip() if token else ""


def _attention(found: Inspection) -> str:
    if not found.attention:
        return ""
    kind = f"block of {found.block_size}" if found.attention == "block" else "full"
    return f"{kind}; logits {'shifted by one' if found.logit_shift else 'in place'}"
