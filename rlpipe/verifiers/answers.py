r"""Where the answer stands in a response: in tags, in the last \boxed{…}, on the last line, or all of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from rlpipe.errors import ConfigError

BOX = "\\boxed"


def extract(text: str, where: str) -> str | None:
    """The answer, without white space around it; None if there is none.

    where: tag | boxed | last_line | whole | auto (tag, else boxed, else whole, by what the response has). Raises ConfigError
    for another name.
    """
    if where not in EXTRACTORS:
        near = difflib.get_close_matches(where, EXTRACTORS, n=1, cutoff=0.0)[0]
        known = ", ".join(EXTRACTORS)
        raise ConfigError(f"verifier.options.extract={where} is not one of {known}; did you mean {near}?")
    found = EXTRACTORS[where](text)
    return found.strip() or None if found is not None else None


def tagged(text: str, tag: str = "answer") -> str | None:
    """Inside the last <answer>…</answer> that closes. Tags do not nest."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return text[start + len(tag) + 2 : end] if start >= 0 else None


def boxed(text: str) -> str | None:
    r"""Inside the last \boxed{…} or \fbox{…}, braces matched; None if that one does not close: it was cut off, and what an
    earlier box says was taken back by opening another."""
    start = max(text.rfind(BOX + "{"), text.rfind(BOX + " {"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    opened = text.index("{", start)
    depth, escaped = 0, False
    for place in range(opened, len(text)):
        character = text[place]
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[opened + 1 : place]
    return None


def last_line(text: str) -> str | None:
    """The last line that is not blank."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else None


def whole(text: str) -> str:
    return text


def auto(text: str) -> str | None:
    """A pair of tags is believed first, then a box, opened or closed; a response with neither is its own answer."""
    if "</answer>" in text:
        return tagged(text)
    return boxed(text) if has_box(text) else text


def has_box(text: str) -> bool:
    return BOX in text or "\\fbox" in text


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "auto": auto,
    "tag": tagged,
    "boxed": boxed,
    "last_line": last_line,
    "whole": whole,
}
