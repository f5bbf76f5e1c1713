"""A model family as data: which stock class computes it, what its config.json and its weights are called, how it denoises.

A newcomer whose network is that of a stock class is one literal of some ten lines, here or in a file of the user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rlpipe.errors import ModelError
from rlpipe.models.spec import CONFIG_KEY, DiffusionSpec
from rlpipe.models.weight_map import Rule, Tied, WeightMap

# What no family computes otherwise: values of config.json that would change the arithmetic. () is: must not be there.
ALWAYS = {"use_sliding_window": (False,), "quantization_config": ()}
ONLY = ALWAYS | {"hidden_act": ("silu",)}
BATCHED_ROPE = ("dynamic", "longrope")  # their frequencies follow the longest text of a batch
# Not taken over: a padding id would freeze that row of the embedding; the rest plays no part in our forward.
LEFT_OUT = {
    "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "attention_dropout", "output_router_logits", "layer_types",
    "sliding_window", "use_sliding_window", "max_window_layers",
}  # fmt: skip
BLOCK_KEYS = ("block_size", "block_length")
GENERATION = "generation_config.json"
OWN = {"tie_word_embeddings", "head_dim"}  # read by every stock class, a field of its config class or not
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
SIZES = {*REQUIRED[:-1], "num_key_value_heads", "head_dim", "moe_intermediate_size", "num_experts", "num_experts_per_tok"}
SIZES |= {"n_routed_experts", "n_shared_experts"}


@dataclass(frozen=True)
class TokenFacts:
    """What a folder's tokenizer and generation_config.json say; empty without them.

    added: ids of the added and special tokens by their text · generation: generation_config.json as a dict.
    """

    mask_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer, generation: Mapping[str, Any] | None = None) -> TokenFacts:
        ids = (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return cls(*ids, added=tokenizer.get_added_vocab(), generation=generation or {})


def _no_rules(config) -> tuple[Rule, ...]:
    return ()


def _as_is(original: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """Example: `Family("mine", ("MyModelLM",), "Qwen3ForCausalLM", attention="block", block_size=8, mask_id=5)`.

    architectures: values of "architectures" in config.json · stock: the transformers class, "" for the architecture itself ·
    model_types: values of "model_type", looked at only where no architecture is named · marker: an added token of the tokenizer
    that tells the family from a plain model of the same architecture.
    keys: stock key → what config.json calls it, where they differ · defaults: what a missing or null key of config.json means ·
    fixed: stock keys that config.json does not decide · only: keys of config.json with the values that the stock class computes
    · required: further keys that must be there · adjust: (config.json with defaults, stock values) → further stock values.
    rules: (stock config) → rules of the weight map.
    attention, block_size, logit_shift: as in DiffusionSpec; config.json's own block_size goes first · mask_token, mask_id: text
    and id of MASK where config.json does not say · ends: texts of the tokens that end a response, with their ids (-1: only the
    tokenizer knows) · template: a note on the chat format.
    """

    name: str
    architectures: tuple[str, ...]
    stock: str
    model_types: tuple[str, ...] = ()
    marker: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    adjust: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = _as_is
    rules: Callable[[Any], tuple[Rule, ...]] = _no_rules
    attention: str = "full"
    block_size: int = 0
    logit_shift: int = 0
    mask_token: str = ""
    mask_id: int = -1
    ends: Mapping[str, int] = field(default_factory=dict)
    template: str = "the tokenizer's own"

    def model_class(self, original: dict[str, Any]) -> type:
        """The transformers class that computes it. Raises ModelError, with the nearest name, if there is none."""
        import transformers

        name = self.stock or original["architectures"][0]
        if not hasattr(transformers, name):
            near = difflib.get_close_matches(name, dir(transformers), n=1, cutoff=0.0)[0]
            raise ModelError(f"family {self.name}: transformers has no class {name}; did you mean {near}?")
        return getattr(transformers, name)

    def config(self, original: dict[str, Any]):
        """config.json as a dict → config of the stock class. Raises ModelError, naming the key, for values that the stock class
        does not compute, for keys that are missing and for a config that contradicts itself."""
        from huggingface_hub.errors import StrictDataclassError

        config_class = self.model_class(original).config_class
        try:
            if self.stock:
                config = config_class(**self._values(original, config_class))
            else:
                self._refuse(original, ALWAYS)
                config = config_class.from_dict(original)
                config.pad_token_id = None  # it would freeze that row of the embedding, which is often EOS's
        except (StrictDataclassError, TypeError, ValueError) as error:
            raise ModelError(f"config.json contradicts itself (read as {self.name}): {error}") from error
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
        if rope in BATCHED_ROPE:
            raise ModelError(
                f"config.json: the rotary type {rope!r} changes with the longest text of a batch, so a token's log-probability "
                "would depend on its neighbours. Known are those that do not: default, linear, llama3, yarn"
            )
        return config

    def _refuse(self, said: Mapping[str, Any], only: Mapping[str, tuple]) -> None:
        """Raises ModelError for the first key whose value is not among those that the stock class computes."""
        for key, allowed in only.items():
            if said.get(key) is not None and said[key] not in allowed:
                known = " or ".join(map(repr, allowed)) or "nothing"
                stock = self.stock or said["architectures"][0]
                raise ModelError(
                    f"config.json: {key} is {said[key]!r}. The family {self.name} is computed by {stock}, which knows "
                    f"only {known} there; another stock class needs a family of its own (model.family=my_family.py:NAME)"
                )

    def _values(self, original: dict[str, Any], config_class: type) -> dict[str, Any]:
        from transformers import PreTrainedConfig

        said = dict(self.defaults) | {key: value for key, value in original.items() if value is not None}
        self._refuse(said, ONLY | dict(self.only))
        shared = OWN | {f.name for f in fields(config_class)} - {f.name for f in fields(PreTrainedConfig)} - LEFT_OUT
        values = {key: said[key] for key in shared if key in said}
        values |= {stock: said[name] for stock, name in self.keys.items() if name in said}
        values |= self.fixed
        values |= self.adjust(said, values)
        missing = [self.keys.get(key, key) for key in (*REQUIRED, *self.required) if key not in values]
        if missing:
            raise ModelError(f"config.json has no {', '.join(missing)}, so a {self.name} model cannot be built from it")
        for key in sorted(SIZES & values.keys()):
            if not isinstance(values[key], int) or values[key] < 1:
                said_as = self.keys.get(key, key)
                raise ModelError(
                    f"config.json: {said_as} is {values[key]!r}, and a {self.name} model needs a number above 0 there"
                )
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values.setdefault("tie_word_embeddings", False)
        return values | {"architectures": [self.stock], "rope_parameters": self._rope(said, values)}

    def _rope(self, said: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """Rotary settings in the form of transformers 5, from that or from rope_theta and rope_scaling."""
        rope = {"rope_type": "default"} | dict(said.get("rope_scaling", {})) | dict(said.get("rope_parameters", {}))
        if "type" in rope:
            rope["rope_type"] = rope.pop("type")
        if "rope_theta" in said:
            rope.setdefault("rope_theta", said["rope_theta"])
        if "rope_theta" not in rope:
            raise ModelError(f"config.json has no rope_theta, so a {self.name} model cannot be built from it")
        if "partial_rotary_factor" in values:
            rope.setdefault("partial_rotary_factor", values.pop("partial_rotary_factor"))
        return rope | {"rope_theta": float(rope["rope_theta"])}

    def weights(self, original: dict[str, Any]) -> WeightMap:
        """The map between names and layouts of the checkpoint and those of the stock class."""
        config = self.config(original)
        rules = self.rules(config)
        if config.tie_word_embeddings:
            plain = WeightMap(rules)
            names = [plain.stock(name).names[0] for name in ("lm_head.weight", "model.embed_tokens.weight")]
            rules = (Tied(*names), *rules)
        return WeightMap(rules)

    def spec(self, original: dict[str, Any], tokens: TokenFacts | None = None) -> DiffusionSpec:
        """How it denoises: config.json's "diffusion" entry if it has one, else config.json, generation config, tokenizer and
        what is known of the family, in this order. Raises ModelError if MASK is unknown or outside the vocabulary."""
        tokens = tokens or TokenFacts()
        if CONFIG_KEY in original:
            spec = DiffusionSpec.from_dict(original[CONFIG_KEY])
            self._inside(original, spec.mask_token_id)
            odd = [id for id in (*spec.eos_token_ids, *spec.suppressed_ids) if id >= self._rows(original)]
            if odd:
                raise ModelError(
                    f"the '{CONFIG_KEY}' entry of config.json names the id {odd[0]}, and the embedding has "
                    f"{self._rows(original)} rows. Correct eos_token_ids or suppressed_ids there"
                )
            return spec
        mask = self._mask(original, tokens)
        ends = self._ends(original, tokens)
        pad = _first_id(*_ids(original, "pad_token_id"), tokens.pad_id)
        return DiffusionSpec(
            mask_token_id=mask,
            eos_token_ids=ends,
            attention=self.attention,
            block_size=self._block(original) if self.attention == "block" else 0,
            logit_shift=self.logit_shift,
            suppressed_ids=(pad,) if pad is not None and pad < self._rows(original) and pad not in (*ends, mask) else (),
        )

    def _block(self, original: dict[str, Any]) -> int:
        said = next((original[key] for key in BLOCK_KEYS if original.get(key)), self.block_size)
        if type(said) is not int or said < 1:
            raise ModelError(f"config.json: block_size is {said!r}, and a block of {self.name} holds at least one token")
        return said

    def _mask(self, original: dict[str, Any], tokens: TokenFacts) -> int:
        said = (*_ids(original, "mask_token_id"), *_ids(tokens.generation, "mask_token_id", GENERATION), tokens.mask_id)
        mask = _first_id(*said, tokens.added.get(self.mask_token), self.mask_id)
        if mask is None:
            raise ModelError(
                "nothing says which id MASK has: config.json has no mask_token_id, the tokenizer no mask token, and the family "
                f"{self.name} no default. Set model.mask_token_id"
            )
        self._inside(original, mask)
        return mask

    def _inside(self, original: dict[str, Any], mask: int) -> None:
        rows = self._rows(original)
        if not 0 <= mask < rows:
            raise ModelError(
                f"MASK has id {mask}, but the embedding has {rows} rows: config.json, tokenizer and the family {self.name} do "
                "not belong together. Set model.mask_token_id"
            )

    def _ends(self, original: dict[str, Any], tokens: TokenFacts) -> tuple[int, ...]:
        """Sorted ids, of all that is said anywhere: chat models end a turn with one token and a text with another."""
        known = [tokens.added.get(text, -1) for text in self.ends] if tokens.added else self.ends.values()
        said = (*_ids(tokens.generation, "eos_token_id", GENERATION), *_ids(original, "eos_token_id"), tokens.eos_id, *known)
        rows = self._rows(original)
        return tuple(sorted({id for id in said if id is not None and 0 <= id < rows}))

    def _rows(self, original: dict[str, Any]) -> int:
        return self.config(original).vocab_size


def _first_id(*ids: int | None) -> int | None:
    return next((id for id in ids if id is not None and id >= 0), None)


def _ids(said: Mapping[str, Any], key: str, file: str = "config.json") -> list[int]:
    """One id, several or none. Raises ModelError for what is no id."""
    value = said.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int for id in ids):
        raise ModelError(f"{file}: {key} is {value!r}, and the id of a token is a whole number")
    return ids
