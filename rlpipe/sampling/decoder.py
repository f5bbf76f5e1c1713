"""A decoder frozen for one run of the engine: recipe settings resolved against the model's spec."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from rlpipe.config import DecoderConfig
from rlpipe.errors import ConfigError
from rlpipe.models.spec import DiffusionSpec
from rlpipe.sampling.caching import CACHES, CachePolicy
from rlpipe.sampling.editing import EDITORS, Ancestral, Editor
from rlpipe.sampling.guidance import Guidance
from rlpipe.sampling.memory import Credit
from rlpipe.sampling.schedule import Schedule, TimeGrid, schedule_kind
from rlpipe.sampling.scoring import SCORERS, StepView
from rlpipe.sampling.selection import SELECTORS, Bernoulli, Selector

FUSIONS = {"credit": Credit}
GUIDED = "guided"
SELECTS = (*SELECTORS, GUIDED)
STOPS = ("auto", "block", "prefix", "eotp", "length")


@dataclass(frozen=True, slots=True)
class Decoder:
    """The pieces of a sampler; `DecoderConfig` documents them. block_size: of commits; for full attention 0 means the whole
    canvas. stop: 'block' (a finished block holds EOS), 'prefix' (EOS and everything before it is committed), 'eotp' (the same,
    and everything behind a committed EOS is filled with it at once), 'length' (EOS ends nothing; the text is cut there).
    guidance: of a guided decoder, whose selector is then the plain one."""

    preset: str
    max_tokens: int
    block_size: int
    schedule: Schedule
    selector: Selector
    guidance: Guidance | None
    score: str
    confidence: str
    order_temperature: float
    eos_gamma: float
    fuse: Credit | None
    cache: CachePolicy
    editor: Editor | None
    stop: str
    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def resolve(cls, config: DecoderConfig, spec: DiffusionSpec) -> Decoder:
        """Raises ConfigError where the recipe contradicts itself or the model."""
        block = spec.attention == "block"
        if block and config.block_size not in (0, spec.block_size):
            raise ConfigError(
                f"decoder.block_size={config.block_size}, but the model attends in blocks of {spec.block_size}; "
                "leave it 0, or set model.block_size to adapt the model"
            )
        pieces = make_pieces(config, block)
        decoder = cls(
            preset=config.preset,
            max_tokens=config.max_tokens,
            block_size=spec.block_size if block else config.block_size,
            score=config.score,
            confidence=config.confidence,
            order_temperature=config.order_temperature,
            eos_gamma=config.eos_gamma,
            stop=("block" if block else "prefix") if config.stop == "auto" else config.stop,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            **pieces,
        )
        decoder._check(spec)
        return decoder

    def _check(self, spec: DiffusionSpec) -> None:
        block = spec.attention == "block"
        if self.editor is not None and self.editor.uses_shadow and spec.logit_shift:
            raise ConfigError("decoder.edit=wino reads a position's own row, which a model with shifted logits does not have")
        if block != (self.cache.__class__ is CACHES["block"]):
            fits = "block" if block else ", ".join(name for name in CACHES if name != "block")
            raise ConfigError(f"decoder.cache: a model with {'block' if block else 'full'} attention can have auto, {fits}")
        if block and self.editor is not None and self.editor.scope == "sequence":
            raise ConfigError(
                "decoder.edit=rcr opens earlier blocks again, which a block model cannot: set decoder.options={scope: block}"
            )
        if block and self.stop == "prefix":
            raise ConfigError("decoder.stop=prefix ends inside a block, which block models keep whole: block or eotp")
        grid = isinstance(self.schedule, TimeGrid)
        if not grid and isinstance(self.selector, (Bernoulli, Ancestral)):
            raise ConfigError("decoder.select=bernoulli and decoder.edit=remdm need the time grid of decoder.schedule=dream")
        if isinstance(self.cache, CACHES["dkv_greedy"]) and self.score != "random":
            raise ConfigError("decoder.cache=dkv_greedy needs an order that is known beforehand: decoder.score=random")
        if isinstance(self.cache, CACHES["dkv_greedy"]) and self.guidance is not None:
            raise ConfigError(
                "decoder.select=guided drafts the whole window, and decoder.cache=dkv_greedy forwards a part of it"
            )
        if self.eos_gamma < 1 and not isinstance(self.selector, SELECTORS["static"]):
            raise ConfigError("decoder.eos_gamma needs a selector with a fixed number of steps: decoder.select=static")

    @property
    def state_only(self) -> bool:
        """Positions depend on the state and not on the draws, so the product of token probabilities is the transition's (with
        order_temperature: up to the probability of the order)."""
        return SCORERS[self.score].state_only and self.eos_gamma >= 1 and self.guidance is None

    @property
    def monotone(self) -> bool:
        """A committed token stays: there is a step map."""
        return self.editor is None

    @property
    def replayable(self) -> bool:
        """A forward of the recorded state gives the recorded log-probability: no stale keys, no history, no cut support, and no
        tokens that a guide wrote."""
        return self.cache.exact and self.fuse is None and self.top_p >= 1 and self.top_k == 0 and not self.written_by_guide

    @property
    def written_by_guide(self) -> bool:
        """Some tokens are the guide's and no draws of the policy; they are recorded as preset."""
        return self.guidance is not None and self.guidance.correct

    @property
    def ordered_by_noise(self) -> bool:
        """Somebody looks at the noise that orders positions."""
        return self.score == "random" or "noise" in self.selector.uses

    @property
    def needs(self) -> frozenset[str]:
        """Row statistics that somebody looks at."""
        return SCORERS[self.score].needs | self.selector.needs

    def weigh_eos(self, score: torch.Tensor, is_eos: torch.Tensor, opened: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """EOSER (arXiv 2509.23924): the score of a drawn EOS is multiplied by a factor that rises from eos_gamma to 1 over the
        steps of a block. The published schedule restarts in every block but counts all steps; ours counts the block's own."""
        if self.eos_gamma >= 1:
            return score
        factor = self.eos_gamma + (1.0 - self.eos_gamma) * self.schedule.progress(opened, time)
        return torch.where(is_eos, score * factor.unsqueeze(-1).float(), score)

    def choose(self, view: StepView) -> tuple[torch.Tensor, torch.Tensor]:
        """(commit, forced), bool [slots, B]."""
        return self.selector(view)

    def settings(self) -> dict[str, Any]:
        """What a trajectory records: JSON-able."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "guidance" or self.guidance is not None}
        named = {k: {"kind": type(v).__name__} | asdict(v) if is_dataclass(v) else v for k, v in plain.items()}
        return named | {"state_only": self.state_only, "replayable": self.replayable}


def make_pieces(config: DecoderConfig, block: bool) -> dict[str, Any]:
    """schedule, selector, guidance, editor, fuse and cache of a recipe with their numbers. `options` go to whichever piece has
    a number of that name. Raises ConfigError for unknown names and numbers, with the nearest one."""
    schedule, fixed = schedule_kind(config.schedule)
    guided = _named("select", config.select, SELECTS) == GUIDED
    if guided and config.edit != "none":
        raise ConfigError(
            f"decoder.select=guided and decoder.edit={config.edit}: an editor brings its own selector; choose one"
        )
    select = ("options.base", config.options.get("base", Guidance.base)) if guided else ("select", config.select)
    kinds = {
        "schedule": schedule,
        "selector": _named(*select, SELECTORS),
        "guidance": Guidance if guided else None,
        "editor": _named("edit", config.edit, EDITORS) if config.edit != "none" else None,
        "fuse": _named("fuse", config.fuse, FUSIONS) if config.fuse != "none" else None,
        "cache": _named("cache", config.cache if config.cache != "auto" else ("block" if block else "none"), CACHES),
    }
    for key, known in (("score", SCORERS), ("confidence", ("model", "sampler")), ("stop", STOPS)):
        _named(key, getattr(config, key), known)
    if kinds["editor"] is not None:
        kinds["selector"] = None  # an editor brings its own
    own = {"tokens_per_step": config.tokens_per_step, "threshold": config.threshold} | fixed
    if config.steps:
        own["steps"] = config.steps
    numbers = {piece: {f.name for f in fields(kind)} if kind else set() for piece, kind in kinds.items()}
    for name in config.options:
        if not any(name in known for known in numbers.values()):
            known = sorted(set().union(*numbers.values()))
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(f"decoder.options.{name}: no piece of this decoder has such a number{_hint(near)}")
    given = own | dict(config.options)
    pieces = {
        piece: None if kind is None else kind(**{k: v for k, v in given.items() if k in numbers[piece]})
        for piece, kind in kinds.items()
    }
    if pieces["editor"] is not None:
        pieces["selector"] = pieces["editor"].selector()
    return pieces


def without_guide(config: DecoderConfig) -> DecoderConfig:
    """The plain decoder that a guided one falls back on; any other as it is."""
    if config.select != GUIDED:
        return config
    own = {f.name for f in fields(Guidance)}
    options = {name: value for name, value in config.options.items() if name not in own}
    return replace(config, select=config.options.get("base", Guidance.base), options=options)


def _named(key: str, name: str, known):
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)
        raise ConfigError(f"decoder.{key}={name}: known are {', '.join(known)}{_hint(near)}")
    return known[name] if isinstance(known, dict) else name


def _hint(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""
