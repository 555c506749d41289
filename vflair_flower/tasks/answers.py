"""Read the answer out of what a model wrote: GSM8K's final number, and MATH's last box in a normal form.

It judges no reasoning.  Both sides, the model's and the data set's, go through the same functions.

Invariant: a normal form is its own normal form.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].])-\$?|(?<!\w)\$-)?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
)
_MARK = "####"


@dataclass(frozen=True, slots=True)
class FinalNumber:
    """A number read from a text, and whether it stood after the mark ``####``; else it was the last one."""

    value: Decimal
    marked: bool


def final_number(text: str) -> FinalNumber | None:
    r"""Return the number that a GSM8K answer gives, or None if it has no number.

    It is the first number after the first ``####`` on the same line (Cobbe et al. 2021, arXiv:2110.14168; what a model
    goes on writing after its answer does not count), and the last number of the text if there is no mark with one.
    Thousands separators, a currency sign, a sign and a trailing full stop are understood.  We differ from the paper in
    comparing values, so that 18 and 18.00 agree, and in the fallback, of which every score says how often it was used.

    Examples
    --------
    >>> final_number("5 - 2 = 3, so it is $1,234.50.\n#### 1,234.50").value
    Decimal('1234.50')
    >>> final_number("so there are 12 left.").marked
    False
    """
    text = text.replace("\u2212", "-")
    for line in text.split(_MARK)[1:]:
        found = _NUMBER.search(line.lstrip().split("\n", 1)[0])
        if found:
            return FinalNumber(_value(found), marked=True)
    every = list(_NUMBER.finditer(text))
    return FinalNumber(_value(every[-1]), marked=False) if every else None


def same_number(predicted: FinalNumber | None, reference: FinalNumber | None) -> bool:
    """Return whether both are there and equal as numbers."""
    return predicted is not None and reference is not None and predicted.value == reference.value


def _value(found: "re.Match[str]") -> Decimal:
    digits = Decimal(found["digits"].replace(",", ""))
    return -digits if found["sign"] else digits


def last_boxed(text: str) -> str | None:
    r"""Return what stands in the last ``\boxed{...}`` or ``\fbox{...}``, braces inside it included, or None.

    ``\boxed 7`` counts too.  A box that is never closed does not, nor one before it: the model did not finish.

    Examples
    --------
    >>> last_boxed(r"so $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    starts = list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))
    if not starts:
        return None
    at = starts[-1].end()
    if at >= len(text):
        return None
    if text[at] != "{":
        bare = re.match(r"[^\s$\\]+", text[at:])
        return bare[0].rstrip(".") if bare else None
    depth = 0
    for place in range(at, len(text)):
        escaped = text[place - 1] == "\\"
        depth += (text[place] == "{" and not escaped) - (text[place] == "}" and not escaped)
        if depth == 0:
            return text[at + 1 : place]
    return None


def same_math(predicted: str | None, reference: str | None) -> bool:
    r"""Return whether two MATH answers have the same normal form.

    Examples
    --------
    >>> same_math(r"\dfrac12", "0.5")
    True
    """
    return predicted is not None and reference is not None and normal_math(predicted) == normal_math(reference)


def normal_math(answer: str) -> str:
    r"""Return a MATH answer without what does not change its value.

    The rules are those that Hendrycks et al. (2021, arXiv:2103.03874) describe and their repository lists: spaces,
    ``\left`` and ``\right``, degrees, dollars and per cent, units in ``\text``, a short left-hand side ("x = "), one
    spelling of fractions and roots, a zero before a decimal point.  We add: a full stop at the end, thousands
    separators, ``\mbox`` units, and decimals that end in zeros.  Algebra is not done: ``2x+1`` and ``1+2x`` differ.
    """
    text = answer
    for _ in range(8):  # one rule can make room for another; real answers need one pass
        text, before = _simplified(text), text
        if text == before:
            break
    return text


def _simplified(text: str) -> str:
    text = text.strip()
    for pattern, replacement in _REMOVED:
        text = pattern.sub(replacement, text)
    text = _WORDS.sub(r"\1", _UNITS.sub("", text))
    text = re.sub(r"\s+", "", text)
    text = text.rstrip(".")
    if _GROUPED.fullmatch(text):
        text = re.sub(r"\{?,\}?", "", text)
    left, equals, right = text.partition("=")
    if equals and len(left) <= 2 and "=" not in right:
        text = right
    text = re.sub(r"(?<![\d])\.(?=\d)", "0.", text)
    text = re.sub(r"(\d+\.\d*?)0+(?!\d)", r"\1", text)
    text = re.sub(r"(\d)\.(?!\d)", r"\1", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = _with_braces(text)
    if text in ("0.5", "-0.5"):
        return text.replace("0.5", r"\frac{1}{2}")
    slashed = re.fullmatch(r"(-?\d+)/(\d+)", text)
    if slashed:
        sign, over = ("-", slashed[1][1:]) if slashed[1].startswith("-") else ("", slashed[1])
        return rf"{sign}\frac{{{over}}}{{{slashed[2]}}}"
    return re.sub(r"^\\frac\{-(\d+)\}(\{\d+\})$", r"-\\frac{\1}\2", text)


# In this order: a spacing command before the backslash rules could tear it apart.
_REMOVED = (
    (re.compile(r"\\[!,;:]"), ""),
    (re.compile(r"\\ "), " "),
    (re.compile(r"\\\\"), r"\\"),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-z])"), ""),
    (re.compile(r"\^\{?\\circ\}?|\\degree(?![a-z])|°"), ""),
    (re.compile(r"\\?[$%]"), ""),
)
_UNITS = re.compile(r"(?<=[\d})])(?:\s|~)*\\(?:text|mbox|mathrm|textrm)\{\s*[^{}]*\}(?:\^\{?\d\}?)?\s*$")
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf)\{([^{}]*)\}")
_GROUPED = re.compile(r"-?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")


_ARGUMENT = r"(\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-zA-Z]+|[^{}\\])"
_FRACTION = re.compile(rf"{_ARGUMENT}{_ARGUMENT}(.*)$", re.DOTALL)


def _with_braces(text: str) -> str:
    r"""Write ``\frac12`` and ``\frac1{2}`` as ``\frac{1}{2}``."""
    parts = text.split(r"\frac")
    made = parts[0]
    for part in parts[1:]:
        found = _FRACTION.match(part)
        if not found:
            made += r"\frac" + part
            continue
        over, under = (one if one.startswith("{") else f"{{{one}}}" for one in (found[1], found[2]))
        made += rf"\frac{over}{under}{found[3]}"
    return made
