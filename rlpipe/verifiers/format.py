"""The shape of a response, whatever it says."""

from __future__ import annotations

import difflib
import re
from functools import cache

from rlpipe.errors import ConfigError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.answers import extract

PAIRS = r"(?s)\s*<{tag}>(?:(?!</?(?:{tag}|answer)>).)*</{tag}>\s*<answer>(?:(?!</?(?:{tag}|answer)>).)+</answer>\s*"
NAMED = {
    "boxed": None,  # the last box closes and holds something; braces are no matter for a regular expression
    "answer_tag": r"(?s).*<answer>\s*\S.*</answer>\s*",
    "think_answer": PAIRS.format(tag="think"),
    "reasoning_answer": PAIRS.format(tag="reasoning"),
}


def verify(prompt: Prompt, response: str, *, pattern: str = "boxed") -> float:
    r"""1 if the whole response has the shape, else 0. pattern: boxed (its last \boxed{…} closes and is not empty) | answer_tag
    (ends with <answer>…</answer>) | think_answer, reasoning_answer (one pair of each, in this order, and nothing else) | a
    regular expression that must match all of it. Raises ConfigError for one that cannot be compiled."""
    if pattern == "boxed":
        return float(extract(response, "boxed") is not None)
    return float(_compiled(pattern).fullmatch(response) is not None)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    if re.fullmatch(r"[a-z_]+", pattern) and pattern not in NAMED:
        near = difflib.get_close_matches(pattern, NAMED, n=1, cutoff=0.0)[0]
        raise ConfigError(f"verifier.options.pattern={pattern}: known are {', '.join(NAMED)}; did you mean {near}?")
    try:
        return re.compile(NAMED.get(pattern) or pattern)
    except re.error as error:
        raise ConfigError(f"verifier.options.pattern={pattern!r} is no regular expression: {error}") from error
