r"""Answers of competition mathematics: the last \boxed{} of a solution and when two are equal.

Source: the string rules of the MATH benchmark (Hendrycks et al. 2021), in our own words. They
compare spellings, not values: "0.5", "1/2" and "\frac12" are one answer, "1/2" and "2/4" are two.
`math_verify` judges by value.
"""

from __future__ import annotations

import re

_ANSWER_MARK = "The answer is: "
_BOX = re.compile(r"\\(?:boxed|fbox)(?=[{ ])")
# Spellings that mean nothing, in the order in which the rules take them away or replace them.
_SPELLINGS = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
_UNIT = "\\text{ "


def boxed_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{} or \fbox{} of the text, braces matched.

    ``\boxed 5$`` without braces is read up to the next dollar sign.

    Returns:
        None where there is no box, or where the last one is never closed.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start] == " ":
        return text[start + 1 :].split("$")[0]
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position]
    return None


def stated_answer(text: str) -> str | None:
    """What stands behind the last "The answer is: ", up to the end of its sentence.

    Source: MetaMath's evaluation of MATH (Yu et al. 2023).
    """
    _, mark, answer = text.rpartition(_ANSWER_MARK)
    return answer.split(".\n")[0].strip().removesuffix(".") or None if mark else None


def is_equiv(first: str, second: str) -> bool:
    """Whether two answers are spelled alike once `normalize` has unified them.

    Where the rules do not apply to one of them, the spellings as given decide.
    """
    try:
        return normalize(first) == normalize(second)
    except ValueError:
        return first == second


def normalize(answer: str) -> str:
    r"""One spelling for many of an answer: units, spaces, degree signs and short fractions unified.

    Raises:
        ValueError: a unit stands in the middle, or a root or a fraction has no argument.
    """
    for spelling, replacement in _SPELLINGS:
        answer = answer.replace(spelling, replacement)
    answer = _without_unit(answer).replace("\\%", "")
    answer = answer.replace(" .", " 0.").replace("{.", "{0.")
    if answer.startswith("."):
        answer = "0" + answer
    # "x = 5" and "k=5" give 5; a longer left side is part of the answer.
    sides = answer.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        answer = sides[1]
    answer = _braced_roots(answer).replace(" ", "")
    answer = _braced_fractions(answer)
    if answer == "0.5":
        return "\\frac{1}{2}"
    return _slash_as_fraction(answer)


def _without_unit(answer: str) -> str:
    if _UNIT not in answer:
        return answer
    value, *units = answer.split(_UNIT)
    if len(units) > 1:
        raise ValueError(f"several units in {answer!r}")
    return value


def _braced_roots(answer: str) -> str:
    r"""``\sqrt3`` as ``\sqrt{3}``."""
    first, *roots = answer.split("\\sqrt")
    if "" in roots:
        raise ValueError(f"a root of nothing in {answer!r}")
    return first + "".join(
        "\\sqrt" + (root if root[0] == "{" else f"{{{root[0]}}}{root[1:]}") for root in roots
    )


def _braced_fractions(answer: str) -> str:
    r"""``\frac12`` and ``\frac1{2}`` as ``\frac{1}{2}``; a braced numerator is left as it is."""
    first, *fractions = answer.split("\\frac")
    return first + "".join("\\frac" + _braced_arguments(fraction) for fraction in fractions)


def _braced_arguments(arguments: str) -> str:
    if arguments.startswith("{"):
        return arguments
    if len(arguments) < 2:
        raise ValueError(f"a fraction of {arguments!r}")
    numerator, denominator, rest = arguments[0], arguments[1], arguments[2:]
    if denominator == "{":
        return f"{{{numerator}}}{{{rest}"
    return f"{{{numerator}}}{{{denominator}}}{rest}"


def _slash_as_fraction(answer: str) -> str:
    """Two whole numbers with a slash between them, and nothing else, as a fraction."""
    match = re.fullmatch(r"(-?\d+)/(-?\d+)", answer)
    if match is None:
        return answer
    numerator, denominator = int(match[1]), int(match[2])
    # "04/2" is left alone: it is not how its numbers are written.
    if answer != f"{numerator}/{denominator}":
        return answer
    return f"\\frac{{{numerator}}}{{{denominator}}}"
