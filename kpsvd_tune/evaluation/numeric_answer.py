"""Numbers in text: the answer rules of GSM8K's scorers, and that of our exact match.

Each rule keeps the name and the quirks of the code that published figures were computed with.
All take a text and return a comparable value, or None where there is nothing to extract.

Source: "strict" and "flexible" are the two filters of EleutherAI's lm-evaluation-harness for
GSM8K; "metamath" is the rule of MetaMath's evaluation (Yu et al. 2023).
"""

from __future__ import annotations

import re
from fractions import Fraction
from unicodedata import normalize

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_METAMATH_MARK = "The answer is: "
_METAMATH = re.compile(r"[-+]?\d*[.,/]?\d+")

# A sign must touch its number and stand apart from what comes before: "10-3" and "10 - 3" hold no
# -3. Commas join groups of three digits and separate everything else.
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)\].]) [-\u2212] )? \$? (?P<inner> (?<=\$) [-\u2212] )?
    (?:
        (?P<fraction> (?<![\d/.]) \d+ / \d+ (?! [\d/] ) )
      | (?P<decimal>
            (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?: \.\d+ )?
          | (?<![\d.]) \.\d+
        )
        (?P<exponent> [eE] [-+]? \d{1,2} (?![\w]) )?
    )
    """,
    re.VERBOSE | re.ASCII,
)
# A runaway model writes endless digits; Python refuses to read more than 4300 of them.
_MAX_DIGITS = 300


def strict_answer(text: str) -> str | None:
    """The number behind the first ``#### ``, as a text without commas and trailing dots."""
    match = _STRICT.search(text)
    return _bare(match[1]) if match else None


def flexible_answer(text: str) -> str | None:
    """The last number in the text, as a text without commas, $ and trailing dots.

    Unlike in the source, dots and commas without a digit are no number; all trailing dots go.
    """
    numbers = [bare for found in _FLEXIBLE.findall(text) if (bare := _bare(found))]
    return numbers[-1] if numbers else None


def gsm8k_gold(gold: str) -> str | None:
    """The right answer in a gold text: behind its last ``####``, else its last number."""
    _, mark, answer = gold.rpartition("####")
    return _bare(answer.strip()) if mark else flexible_answer(gold)


def metamath_answer(text: str) -> int | None:
    """The first number behind the last "The answer is: ", rounded half to even.

    The published rule, kept for comparison, reads one comma at most: "1,234,567" is 1234.
    """
    before, mark, answer = text.rpartition(_METAMATH_MARK)
    match = _METAMATH.search(answer) if mark else None
    if match is None:
        return None
    number = match[0].replace(",", "")
    try:
        if "/" not in number:
            return round(float(number))
        numerator, denominator = number.split("/")
        # A zero denominator is dropped, as in the source.
        return round(float(numerator) / (float(denominator) or 1.0))
    except (ValueError, OverflowError):  # "/5" has no numerator; endless digits are infinite
        return None


def last_number(text: str) -> Fraction | None:
    """The exact value of the last number in the text; None without one of at most 300 characters.

    Reads signs (the Unicode minus too), thousands commas, a leading $, decimals, plain fractions
    such as 3/4 and short exponents, so that "1,200", "$1200.00" and "1.2e3" are one value.
    """
    match = _last_match(text)
    if match is None:
        return None
    sign = -1 if match["sign"] or match["inner"] else 1
    if match["fraction"]:
        numerator, denominator = match["fraction"].split("/")
        if int(denominator) == 0:
            return Fraction(0)  # no fraction: two numbers, the last of them zero
        return sign * Fraction(int(numerator), int(denominator))
    return sign * Fraction(match["decimal"].replace(",", "") + (match["exponent"] or ""))


def around_last_number(text: str) -> tuple[str, str] | None:
    """The text before and after the number that :func:`last_number` reads; None without one."""
    match = _last_match(text)
    return None if match is None else (text[: match.start()], text[match.end() :])


def _last_match(text: str) -> re.Match[str] | None:
    matches = list(_NUMBER.finditer(text))
    match = matches[-1] if matches else None
    return None if match is None or len(match[0]) > _MAX_DIGITS else match


def plain_text(text: str) -> str:
    """The text in lower case with every run of white space as one space, and no dot at its end.

    Letters with marks are one character (NFC): some tokenizers write them so whatever was learnt.
    """
    return " ".join(normalize("NFC", text).casefold().split()).removesuffix(".")


def _bare(number: str) -> str | None:
    bare = number.replace(",", "").replace("$", "").rstrip(".")
    return bare if any(character.isdigit() for character in bare) else None
