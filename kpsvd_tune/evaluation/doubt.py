"""Right answers that do not look like those of the task that is to score them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kpsvd_tune.evaluation.numeric_answer import around_last_number, last_number

# Labels repeat: fewer answers than these say nothing about that.
_LEAST = 5
# Of all rows at most this share have a label of their own.
_MOST_DIFFERENT = 0.9
# Labels and short answers have about so many words, or fewer.
_LABEL_WORDS, _SHORT_WORDS = 5, 12
# A text ends in its last number where no more words follow: "18 dollars every day."
_WORDS_BEHIND = 3
_SHOWN = 40
_WORD = re.compile(r"[^\W\d_]+|\d+")
# Before a number that continues what stands there.
_JOINED = re.compile(r"\d[,.:/\s'\u2019\u2013-]$")
_HALF_DAYS = ("am", "pm")  # no units


@dataclass(frozen=True)
class Doubt:
    """What speaks against a task, and what to do where the rows are the right ones, in words."""

    reason: str
    cure: str


def doubt(task: str, answers: Sequence[str], *, is_sample: bool) -> Doubt | None:
    """What speaks against scoring such right answers with a task; None where nothing.

    Args:
        task: Its name.
        answers: The right answers of rows, in any order.
        is_sample: Whether the rows are a few of many. A few rows may well have a label each, so
            that only answers longer than labels are doubted.
    """
    found = [answer.strip() for answer in answers]
    if len(found) < _LEAST:
        return None
    if task == "label":
        return _doubt_labels(found, is_sample)
    if task == "exact_match":
        return _doubt_texts(found) or _doubt_numbers(found)
    return None


def _doubt_labels(answers: Sequence[str], is_sample: bool) -> Doubt | None:
    num, different = len(answers), len(set(answers))
    if different < _MOST_DIFFERENT * num:
        return None
    if is_sample and _median_words(answers) <= _LABEL_WORDS:
        return None
    return Doubt(
        f"there are {different:,} different answers in {num:,} rows, such as "
        f"{_shown(min(answers, key=len))}, while labels are a few that repeat",
        "the task text scores texts",
    )


def _doubt_texts(answers: Sequence[str]) -> Doubt | None:
    """Long texts, which no model repeats, or which the last number says nothing about."""
    without = [each for each in answers if last_number(each) is None]
    aside = [each for each in answers if _has_number_aside(each)]
    texts = [*without, *aside]
    if 2 * len(texts) <= len(answers) or _median_words(texts) <= _SHORT_WORDS:
        return None
    about = f"most of the {len(answers):,} answers are texts of more than {_SHORT_WORDS} words"
    cure = "the task text scores texts"
    if len(without) >= len(aside):
        return Doubt(f"{about}, and hardly any model writes such a text word for word", cure)
    return Doubt(
        f"{about} that hold numbers and do not end in one, such as "
        f"{_shown(min(aside, key=len))}, and only the last number of each would be compared",
        cure,
    )


def _doubt_numbers(answers: Sequence[str]) -> Doubt | None:
    """Two short answers that differ, and count for each other by their last number."""
    pair = _mistakable(answers)
    if pair is None:
        return _doubt_parts(answers)
    one, other = map(_shown, pair)
    return Doubt(
        f"the right answers {one} and {other} have the same last number, which alone is compared, "
        "so that one would count for the other",
        "compare by exact_text, which is shown beside it; or the task label takes answers that "
        "are a few that repeat, the task text others",
    )


def _doubt_parts(answers: Sequence[str]) -> Doubt | None:
    """A number that is written so that only its end is read."""
    part = next((each for each in answers if _ends_in_part(each)), None)
    if part is None:
        return None
    return Doubt(
        f"of the right answer {_shown(part)} only the last number is compared, a part of it",
        "compare by exact_text, which is shown beside it, or write numbers with a decimal point "
        "and without spaces",
    )


def _mistakable(answers: Iterable[str]) -> tuple[str, str] | None:
    """Two short answers with one last number, each with a word that the other does not have.

    Words that one alone has may be left out by a model: "5" and "5 apples".
    """
    by_number: dict[Fraction, dict[frozenset[str], str]] = {}
    for answer in answers:
        number = last_number(answer)
        if number is None or _is_solution(answer):
            continue
        words = _words_beside(answer)
        known = by_number.setdefault(number, {})
        for others, other in known.items():
            if words - others and others - words:
                return other, answer
        known.setdefault(words, answer)
    return None


def _ends_in_part(answer: str) -> bool:
    """Whether the last number is the end of one that is not read: "1,5", "9:30", "10 000"."""
    around = around_last_number(answer)
    return around is not None and not _is_solution(answer) and bool(_JOINED.search(around[0]))


def _words_beside(answer: str) -> frozenset[str]:
    """The words and numbers of an answer but its last number; none of a number with its unit."""
    around = around_last_number(answer)
    assert around is not None
    before, behind = around
    is_quantity = not _WORD.search(before) and _is_unit(behind)
    return frozenset() if is_quantity else frozenset(_WORD.findall(f"{before} {behind}".casefold()))


def _is_unit(text: str) -> bool:
    """Whether a text is one word in lower case, as in "5 apples"; of times of day it is no unit."""
    is_word = len(text.split()) == 1 and text.islower()
    return is_word and text.strip().replace(".", "") not in _HALF_DAYS


def _is_solution(answer: str) -> bool:
    """Whether a text works out its last number, or is too long to be given as a whole."""
    num_words = len(answer.split())
    is_sentence = num_words > _LABEL_WORDS and not _has_number_aside(answer)
    return "####" in answer or "=" in answer or num_words > _SHORT_WORDS or is_sentence


def _has_number_aside(answer: str) -> bool:
    """Whether a text holds numbers, and says more behind the last of them."""
    around = around_last_number(answer)
    if around is None or "####" in answer:
        return False
    return len(around[1].split()) > _WORDS_BEHIND


def _shown(answer: str) -> str:
    return repr(answer if len(answer) <= _SHOWN else answer[:_SHOWN].rstrip() + "...")


def _median_words(texts: Sequence[str]) -> int:
    return sorted(len(text.split()) for text in texts)[len(texts) // 2]
