r"""Mathematical equality: plain numbers and equal texts at once, everything else by the math-verify library under a limit."""

from __future__ import annotations

from functools import cache, lru_cache

from rlpipe.errors import DataError
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.answers import extract, has_box
from rlpipe.verifiers.judge import Judge, UnreadableReference
from rlpipe.verifiers.numerals import numeral, same_in_bases, same_number, tidy

LONGEST_ANSWER = 1_000  # characters in a box; no answer of a sum is longer
OVERTIME_S = 2.0
LONGEST_SEARCH = 4_000  # characters from the end of a response without a box that are searched for an answer


def verify(prompt: Prompt, response: str, *, extract: str = "auto", seconds: float = OVERTIME_S) -> dict[str, float]:
    r"""reward 1 if the response's final answer equals prompt.answer["answer"], else 0; timeout 1 if it could not be judged.

    extract: where the answer stands, see `answers.extract`; under auto a response without tags and without a box is searched
    from its end, as the library does. The last box counts; an empty one, or one that does not close, is no answer. seconds: of
    processor time for one comparison; an answer that takes more, or more memory than a comparison gets, is wrong and counted
    under `timeout`. Raises UnreadableReference for the reference, VerifierFailed if the comparison itself fails.
    """
    reference = _reference(prompt)
    verdict = judged(reference, _answer(response, extract), seconds)
    if verdict == "unreadable":
        raise UnreadableReference(
            f"verifier math: the reference answer {reference!r} of {prompt.uid} cannot be read; correct it"
        )
    return {"reward": float(verdict == "right"), "timeout": float(verdict == "overtime")}


def check(prompt: Prompt) -> None:
    """Raises DataError if the reference answer cannot be read."""
    try:
        reference = _reference(prompt)
        if numeral(tidy(reference)) is None:
            verify(prompt, "")
    except UnreadableReference as error:
        raise DataError(str(error)) from error


def longest(prompt: Prompt, *, seconds: float = OVERTIME_S, **_: object) -> float:
    """Seconds: an answer that breaks its limit, and the reference tried alone, each up to twice."""
    return 4 * seconds


def prepare() -> None:
    """Load the library while there is something else to do."""
    _judge().start()


def release() -> None:
    """End the process that prepare, or a comparison, has started."""
    _judge().close()


def _reference(prompt: Prompt) -> str:
    text = str(prompt.answer["answer"])
    found = (extract(text, "boxed") if has_box(text) else text.strip()) or ""
    if not found or len(found) > LONGEST_ANSWER:
        reason = f"it has {len(found)} characters; give the final answer alone" if found else "it is empty"
        raise UnreadableReference(
            f"verifier math: the reference answer {text[:200]!r} of {prompt.uid} cannot be read: {reason}"
        )
    return found


def _answer(response: str, where: str) -> str:
    """The answer alone, or, under a $-less search, the end of the response; empty if there is none."""
    if where == "auto" and "</answer>" not in response and not has_box(response):
        return SEARCH + response[-LONGEST_SEARCH:]
    found = extract(response, where)
    if found and where != "boxed" and has_box(found):
        found = extract(found, "boxed")  # a box inside the tags
    return found if found and len(found) <= LONGEST_ANSWER else ""


SEARCH = "\x00"  # marks a text in which the answer has still to be found; no answer begins with it


@lru_cache(maxsize=4096)
def judged(reference: str, answer: str, seconds: float) -> str:
    """right | wrong | unreadable | overtime. Cheap tests first; most responses of a group end in the same few answers."""
    if not answer.strip(SEARCH).strip():
        answer = "x_{0}"  # no answer; the reference must be readable all the same
    shown = tidy(answer.removeprefix(SEARCH))
    wanted = tidy(reference)
    if shown and shown == wanted:
        return "right"
    same = same_in_bases(wanted, shown)
    if same is not None:
        return "right" if same else "wrong"
    number, other = numeral(wanted), numeral(shown)
    if number and other:
        same = same_number(number, other)
        if same is not None:
            return "right" if same else "wrong"
    text = answer.removeprefix(SEARCH) if answer.startswith(SEARCH) else f"\\boxed{{{answer}}}"
    return _judge().compare(f"\\boxed{{{reference}}}", text, seconds)


@cache
def _judge() -> Judge:
    return Judge()
