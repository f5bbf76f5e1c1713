r"""Plain numbers as people and LaTeX write them, such as 1,000 · 1\frac{1}{2} · 3.5\times10^{3} · 50\% · \$5 · 3\text{ cm}."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 100  # characters; a longer number is not plain
LARGEST_EXPONENT = 400  # of ten
SAME = Fraction(2, 10**6)  # the library rounds to six decimals; numbers further apart than this differ there too

UNITS = {
    "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre", "km": "km kilometer kilometre",
    "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile", "mg": "mg milligram", "g": "g gram",
    "kg": "kg kilogram", "lb": "lb pound", "oz": "oz ounce", "s": "s sec second", "min": "min minute", "h": "h hr hour",
    "day": "day", "week": "week", "month": "month", "year": "yr year", "dollar": "$ dollar usd", "cent": "cent",
    "degree": "° degree deg", "l": "l liter litre", "ml": "ml milliliter millilitre", "mph": "mph", "euro": "€ euro eur",
    "£": "£",
}  # fmt: skip
UNIT_OF = {word: unit for unit, words in UNITS.items() for word in words.split()}

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
DECIMAL = rf"(?:{DIGITS}(?:\.\d*)?|\.\d+)"
POWER = r"(?:(?: ?(?:\\times|\\cdot|×|·|\*) ?10 ?\^ ?|[eE])(?P<power>\{ ?[-+]?\d+ ?\}|[-+]?\d+))"
NUMBER = re.compile(
    rf"(?P<minus>[-+]?) ?(?P<currency>\\?\$|[€£])? ?(?P<minus2>-?)"
    rf"(?:(?P<whole>\d+) ?(?:(?=\\frac)|(?<= )(?={DECIMAL} ?/)))?"  # of a mixed number
    rf"(?:\\frac ?\{{ ?(?P<top>-?{DECIMAL}) ?\}} ?\{{ ?(?P<bottom>{DECIMAL}) ?\}}|\\frac ?(?P<t>\d) ?(?P<b>\d)"
    rf"|(?P<over>{DECIMAL}) ?/ ?(?P<under>{DECIMAL})|10 ?\^ ?(?P<ten>\{{ ?[-+]?\d+ ?\}}|\d)|(?P<plain>{DECIMAL}){POWER}?)"
    r" ?(?P<percent>\\?%|percent\b)?(?P<degree>\^ ?\{ ?\\circ ?\}|\^ ?\\circ|°|\\degree)?"
    r"(?: (?P<letter>[A-Za-z])| ?(?P<unit>[A-Za-z]{2,}|\$|€|£))?(?: ?\^ ?\{?(?P<dimension>[23])\}?)?\.?"
)
WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname) ?\{([^{}]*)\}")
SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[;: ]|\\,|~")
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!,?|,\\!)(?=\d{3}(?!\d))")
BASED = re.compile(r"((?=[A-Fa-f]*\d)[0-9A-Fa-f]+)_ ?\{? ?(\d{1,2}) ?\}?")


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number, with what stood beside it. percent: it is so many hundredths, or meant to be compared with a plain number ·
    unit: in one spelling, with its dimension; empty without."""

    value: Fraction
    percent: bool
    unit: str


def tidy(text: str) -> str:
    r"""One spelling of what means the same on paper: no $, \text, \left, \dfrac or thin spaces, no spaces but between words or
    digits, no full stop behind it."""
    text = text.strip().strip("*").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing):
            text = text[len(opening) : -len(closing)].strip()
    text = THOUSANDS.sub(",", text).replace("−", "-").replace("–", "-").replace("\\!", "")
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = SPACING.sub(" ", WRAPPED.sub(r" \1 ", text))
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()
    text = re.sub(r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1", text)
    text = text.removesuffix("\\\\").rstrip()
    return text.rstrip(".,;").rstrip() if not text.endswith("...") else text


def numeral(text: str) -> Numeral | None:
    """Of a tidy text; None if it is anything but one plain number, with or without its unit."""
    found = NUMBER.fullmatch(text) if len(text) <= LONGEST else None
    if found is None:
        return None
    part = found.groupdict()
    unit = part["unit"] or part["letter"] or part["currency"] or ("°" if part["degree"] else "")
    word = unit.lower().removeprefix("\\")
    # 3m may be three times m; 3 m, or \text{m}, is a length
    known = UNIT_OF.get(word) or UNIT_OF.get(word.removesuffix("s"))
    if (unit and not known) or (part["whole"] and (part["plain"] or part["ten"])) or (part["dimension"] and not unit):
        return None
    try:
        value = _value(part)
    except ZeroDivisionError:
        return None
    if value is None or (part["minus"] and part["minus2"]):
        return None
    negative = "-" in (part["minus"], part["minus2"])
    return Numeral(-value if negative else value, bool(part["percent"]), f"{known or ''}{part['dimension'] or ''}")


def _value(part: dict[str, str | None]) -> Fraction | None:
    """Without its sign; None for a power of ten too large to be computed."""
    if part["ten"]:
        power = int(part["ten"].strip("{} "))
        return Fraction(10) ** power if abs(power) <= LARGEST_EXPONENT else None
    whole = Fraction(part["whole"] or 0)
    for top, bottom in (("top", "bottom"), ("t", "b"), ("over", "under")):
        if part[top]:
            value = _decimal(part[top]) / _decimal(part[bottom])
            return whole + value if not (part["whole"] and value < 0) else None
    power = int((part["power"] or "0").strip("{} "))
    return _decimal(part["plain"]) * Fraction(10) ** power if abs(power) <= LARGEST_EXPONENT else None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip(".") or "0")


def same_in_bases(reference: str, answer: str) -> bool | None:
    """Of tidy texts, one of which at least names its base, as 1011_2; None for others.

    Where both do, the values decide; one that does not may mean the digits or the value.
    """
    found = [BASED.fullmatch(text) for text in (reference, answer)]
    if not any(found) or any(len(text) > LONGEST for text in (reference, answer)):
        return None
    digits = [each[1].upper() if each else text for each, text in zip(found, (reference, answer), strict=True)]
    try:
        values = [int(each[1], int(each[2])) if each else None for each in found]
    except ValueError:  # a digit that the base does not have, or a base that does not exist
        return False if all(found) else None
    if all(found):
        return values[0] == values[1]
    return digits[0] == digits[1] or str(values[0] if found[0] else values[1]) in digits


def same_number(reference: Numeral, answer: Numeral) -> bool | None:
    """Whether both are the same number; None if they are so close that it takes rounding to say.

    A percentage equals the number before its sign, too: a question that asks for a percentage is answered either way. Units
    must agree where both have one.
    """
    if reference.unit and answer.unit and reference.unit != answer.unit:
        return False
    pairs = [(reference.value, answer.value)]
    if reference.percent and not answer.percent:
        pairs.append((reference.value / 100, answer.value))
    if answer.percent and not reference.percent:
        pairs.append((reference.value, answer.value / 100))
    if any(one == other for one, other in pairs):
        return True
    return None if any(abs(one - other) < SAME for one, other in pairs) else False
