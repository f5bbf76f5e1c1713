"""What prompts need of a model folder without loading the model: its chat template and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from rlpipe.contradictions import CONVERT
from rlpipe.errors import ConfigError, DataError, ModelError
from rlpipe.model_shapes import is_hub_id, local_folder

FILES = [
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "added_tokens.json", "special_tokens_map.json",
    "chat_template*", "config.json",
]  # fmt: skip
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class ModelFiles:
    """path: as model.path: a folder, a hub id (from the local cache, or downloaded into it), tiny:NAME, or convert:FOLDER.
    fetch: whether anything may be downloaded."""

    path: str = ""
    revision: str = ""
    fetch: bool = True

    @property
    def is_tiny(self) -> bool:
        return self.path.startswith("tiny:")

    @cached_property
    def folder(self) -> Path | None:
        """None for tiny models, and for a model that is not here and cannot be had."""
        path = self.path.removeprefix(CONVERT)
        if path and Path(path).is_dir():
            return Path(path)
        if not is_hub_id(path):
            return None
        cached = local_folder(path, self.revision)
        if cached is not None or not self.fetch:
            return cached
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(path, revision=self.revision or None, allow_patterns=FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json, {} without. Raises DataError if it is no JSON object."""
        return _json(self.folder / "tokenizer_config.json") if self.folder else {}

    @cached_property
    def chat_source(self) -> str:
        """The model's own chat template (jinja2), empty if it has none: chat_template.jinja, chat_template.json or the entry of
        tokenizer_config.json, in this order. Of several named ones it is `default`."""
        if not self.folder:
            return ""
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf8")
        found = _json(self.folder / "chat_template.json").get("chat_template") or self.settings.get("chat_template") or ""
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template", "") for entry in found if isinstance(entry, Mapping)}
            found = named.get("default", "")
        if not isinstance(found, str):
            raise DataError(f"{self.folder}: the chat template is a {type(found).__name__}, and must be a text")
        return found

    def chat(self, messages: Sequence[tuple[str, str]]) -> str:
        """The conversation as the model was taught to read it, ready for its answer. messages: (role, content) each.

        Rendered as transformers does (same switches, same functions, a sandbox because a template is code from elsewhere), but
        without a first token that the tokenizer puts there itself.
        Raises ConfigError if there is no template, DataError if it refuses the conversation.
        """
        from jinja2.exceptions import TemplateError

        if not self.chat_source:
            raise ConfigError(
                f"data.template asks for the chat template of {self.path or 'the model'}, and it has none "
                f"({'no such folder here' if not self.folder and not self.is_tiny else 'no chat_template in its files'}); take "
                "another template"
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._compiled.render(messages=turns, add_generation_prompt=True, tools=None, documents=None, **self.special)
        except TemplateError as error:
            raise DataError(f"{self.folder}: its chat template refuses the conversation: {error}") from error
        return text.removeprefix(self._put_first)

    @cached_property
    def _put_first(self) -> str:
        """bos_token if the tokenizer begins every text with it, else empty."""
        bos = self.special.get("bos_token", "")
        if (self.folder / "tokenizer.json").is_file():
            return bos if bos and self._tokenizer.encode("").tokens[:1] == [bos] else ""
        return bos if self.settings.get("add_bos_token") else ""

    @cached_property
    def special(self) -> dict[str, str]:
        """bos_token … as texts; tokenizer_config.json writes them as texts or as objects with `content`."""
        other = _json(self.folder / "special_tokens_map.json") if self.folder else {}
        found = {name: self.settings.get(name) or other.get(name) for name in SPECIAL}
        texts = {name: value.get("content") if isinstance(value, Mapping) else value for name, value in found.items()}
        return {name: value for name, value in texts.items() if isinstance(value, str)}

    @cached_property
    def _compiled(self) -> Any:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        world.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
        world.globals.update(raise_exception=refuse, strftime_now=lambda style: datetime.now().strftime(style))
        try:
            return world.from_string(self.chat_source)
        except TemplateError as error:
            raise DataError(f"{self.folder}: its chat template cannot be read: {error}") from error

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt, with those that the tokenizer adds. Raises ConfigError without a tokenizer that can be read."""
        return len(text) if self.is_tiny else len(self._encode(text))  # tiny models: a token a character

    @cached_property
    def _encode(self) -> Callable[[str], Sequence[int]]:
        if self.folder and (self.folder / "tokenizer.json").is_file():
            return lambda text: self._tokenizer.encode(text).ids
        from rlpipe.models.loading import load_tokenizer  # older formats only: it takes transformers to read them

        try:
            if self.folder is None:
                raise ModelError("its files are not here")
            tokenizer = load_tokenizer(self.folder)
        except ModelError as error:
            raise ConfigError(
                f"data.max_prompt_tokens counts with the tokenizer of {self.path or 'a model'}, which cannot be read: {error}; "
                "use data.max_prompt_chars instead"
            ) from error
        return lambda text: tokenizer(text)["input_ids"]

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        path = self.folder / "tokenizer.json"
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: a {type(found).__name__} where an object was expected")
    return found
