"""How a prompt is put to the model: what is asked, and the turns of conversation around it. Named and versioned, or a text.

`data.template` is one of
    a text with {prompt} in it, as it stands
    ASK, TURN or TURN:ASK, each a name of the tables below, `name` for its newest version or `name@1` for that one
    TURN:text with {prompt} in it
The turns `chat` are the model folder's own chat template. A change to a text that was used is a new version, never an edit.
"""

from __future__ import annotations

import difflib
import zlib
from dataclasses import dataclass

from rlpipe.data.model_files import ModelFiles
from rlpipe.errors import ConfigError, DataError
from rlpipe.trajectory import Prompt

NO_MODEL = ModelFiles()
BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
ASKS: dict[str, str] = {
    "plain@1": "{prompt}",
    "boxed@1": BOXED,  # as TraceRL asks SDAR, TraDo and Dream, and Qwen its own models
    "boxed_first@1": "You need to put your final answer in \\boxed{}. This is the problem:\n{prompt}",  # TraceRL, LLaDA
    "boxed_lets@1": "{prompt}\nLet's think step by step and output the final answer within \\boxed{}.",  # MDPO
    "code@1": "{prompt}\n\nWrite the whole function in Python, in one ```python block.",
    # TraceRL's; it also begins the answer with the starter code, which ours shows in the question
    "code_tracerl@1": "{prompt}\nPlace your code within a single Python code block ```python ```. Do not include more than one "
    "code block. ",
    "completion@1": "Complete this Python function. Answer with the whole function in one ```python block.\n"
    "```python\n{prompt}\n```",
}
PROGRAM = "{prompt}\n\nWrite a Python program that reads standard input and prints the answer, in one ```python block."
STDIO: dict[str, str] = {  # what is asked instead where the answer is a program that reads and prints
    "code@1": PROGRAM,
    "completion@1": PROGRAM,
    "code_tracerl@1": "This is the problem:\n{prompt}\nYou should put your code in ```python ```. Use input() to read input "
    "and print() to produce output in your script. ",
}
TURNS: dict[str, str] = {
    "sdar@1": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",  # and TraDo, as TraceRL puts it
    "sdar_think@1": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant<think>\n",
    "dream@1": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llada@1": "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    # TraceRL's own: no empty line behind the headers, and a second start of text
    "llada_tracerl@1": "<|startoftext|><|start_header_id|>user<|end_header_id|>{prompt}<|eot_id|>"
    "<|startoftext|><|start_header_id|>assistant<|end_header_id|>\n",
    "chat@1": "",  # the model's own
}


@dataclass(frozen=True)
class Template:
    """name: with versions, or a text's checksum · ask, stdio: texts with {prompt}; stdio for programs that read and print ·
    turns: text around what is asked, empty for the model's own chat template, "{prompt}" for none · files: of the model, for
    its chat template."""

    name: str
    ask: str = "{prompt}"
    stdio: str = ""
    turns: str = "{prompt}"
    files: ModelFiles = NO_MODEL

    @property
    def is_chat(self) -> bool:
        return not self.turns

    @property
    def label(self) -> str:
        """What tells it from every other: its name, and for the model's own chat template that template's checksum."""
        if not self.is_chat:
            return self.name
        return f"{self.name} (chat template {_checksum(self.files.chat_source) if self.files.chat_source else 'not here yet'})"

    @property
    def is_plain(self) -> bool:
        """It adds nothing."""
        return self.ask == self.turns == "{prompt}" and not self.stdio

    def render(self, prompt: Prompt) -> str:
        """The text that the model reads. Raises DataError for a prompt with earlier turns unless the template is `chat`."""
        tests = prompt.answer.get("tests")
        programs = isinstance(tests, dict) and tests.get("kind") == "stdio"
        asked = (self.stdio if programs and self.stdio else self.ask).replace("{prompt}", prompt.text)
        if self.is_chat:
            return self.files.chat([*prompt.context, ("user", asked)])
        if prompt.context:
            raise DataError(
                f"{prompt.uid} has {len(prompt.context)} turns before its last one, and data.template={self.name} cannot show "
                "them; use chat (or chat:…), the model's own chat template"
            )
        return self.turns.replace("{prompt}", asked)

    @property
    def characters(self) -> str:
        """Of everything it adds (for character tokenizers)."""
        return (self.ask + self.stdio + self.turns).replace("{prompt}", "")

    def text(self) -> str:
        """In full, as a user would want to read it."""
        around = (self.files.chat_source or "not here yet") if self.is_chat else self.turns
        parts = [f"asked: {self.ask!r}"] + ([f"asked of programs that read and print: {self.stdio!r}"] if self.stdio else [])
        if around != "{prompt}":
            kind = f"turns (the chat template of {self.files.path}): " if self.is_chat else "turns: "
            parts.append(f"{kind}{around!r}")
        return "\n".join(parts)


def resolve(setting: str, files: ModelFiles = NO_MODEL) -> Template:
    """The template that `data.template` says. Raises ConfigError with the nearest name for one that there is not."""
    first, colon, rest = setting.partition(":")
    if "{prompt}" in setting and not (colon and newest(first, TURNS)):
        return Template("{prompt}" if setting == "{prompt}" else f"text-{_checksum(setting)}", ask=setting, files=files)
    if colon:
        turns = newest(first, TURNS)
        if not turns:
            raise _unknown(setting, first, TURNS)
        if "{prompt}" in rest:
            inner = Template(f"text-{_checksum(rest)}", ask=rest)
        elif newest(rest, ASKS):
            inner = _ask(newest(rest, ASKS))
        else:
            raise _unknown(setting, rest, ASKS)
        return Template(f"{turns}:{inner.name}", inner.ask, inner.stdio, TURNS[turns], files)
    if turns := newest(setting, TURNS):
        return Template(turns, turns=TURNS[turns], files=files)
    if ask := newest(setting, ASKS):
        return _ask(ask)
    raise _unknown(setting, setting, {**ASKS, **TURNS})


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf8', 'surrogatepass')):08x}"


def _ask(name: str) -> Template:
    return Template(name, ask=ASKS[name], stdio=STDIO.get(name, ""))


def newest(name: str, table: dict[str, str]) -> str:
    """`name@version`: the one that is said, else the newest; empty if there is none."""
    if name in table:
        return name
    versions = [int(known.partition("@")[2]) for known in table if known.partition("@")[0] == name]
    return f"{name}@{max(versions)}" if versions else ""


def _unknown(setting: str, name: str, table: dict[str, str]) -> ConfigError:
    near = difflib.get_close_matches(name, [*table, *(known.partition("@")[0] for known in table)], n=1, cutoff=0.0)[0]
    return ConfigError(
        f"data.template={setting!r}: neither a text with {{prompt}} in it, so the model would not see the task, nor a known "
        f"template ({', '.join(table)}, or TURNS:ASK of them); did you mean {near}?"
    )


def or_without_chat(setting: str, files: ModelFiles) -> Template:
    """A task's default template; without its turns for a model that has no chat template."""
    template = resolve(setting, files)
    if template.is_chat and not files.chat_source:
        return resolve(setting.partition(":")[2] or "plain", files)
    return template
